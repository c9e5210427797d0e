"""Entropy and mode collapse, watched against the model training started from."""

from sft_plugins.collapse.callback import ModeCollapseCallback
from sft_plugins.collapse.detect.verdict import DetectorConfig, Finding, Verdict
from sft_plugins.collapse.probe.prompts import load_prompts
from sft_plugins.collapse.report.page import write_report

__all__ = ["DetectorConfig", "Finding", "ModeCollapseCallback", "Verdict", "load_prompts", "write_report"]
