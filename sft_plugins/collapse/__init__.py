"""Entropy and mode collapse, watched against the model training started from."""

from sft_plugins.collapse.callback import ModeCollapseCallback
from sft_plugins.collapse.detect.verdict import DetectorConfig, Finding, Verdict
from sft_plugins.collapse.probe.prompts import load_prompts
from sft_plugins.collapse.report.page import write_report
from sft_plugins.collapse.softening.soften import Softened, soften

# For the command line, which looks behind no face; no public names.
from sft_plugins.collapse.history import read_history as read_history  # isort: skip
from sft_plugins.collapse.report.page import page_context as page_context  # isort: skip
from sft_plugins.collapse.report.summary import Report as Report  # isort: skip
from sft_plugins.collapse.report.summary import summarise as summarise  # isort: skip
from sft_plugins.collapse.softening.page import SOFTENING_COLUMNS as SOFTENING_COLUMNS  # isort: skip
from sft_plugins.collapse.softening.page import softening_headline as softening_headline  # isort: skip
from sft_plugins.collapse.softening.page import softening_page as softening_page  # isort: skip
from sft_plugins.collapse.softening.page import softening_rows as softening_rows  # isort: skip

__all__ = [
    "DetectorConfig",
    "Finding",
    "ModeCollapseCallback",
    "Softened",
    "Verdict",
    "load_prompts",
    "soften",
    "write_report",
]
