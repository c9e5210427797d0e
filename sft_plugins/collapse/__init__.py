"""Entropy and mode collapse, watched against the model training started from."""

from sft_plugins.collapse.callback import ModeCollapseCallback
from sft_plugins.collapse.prompts import load_prompts
from sft_plugins.collapse.report import write_report
from sft_plugins.collapse.verdict import DetectorConfig, Finding, Verdict

__all__ = ["DetectorConfig", "Finding", "ModeCollapseCallback", "Verdict", "load_prompts", "write_report"]
