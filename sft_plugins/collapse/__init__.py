"""Entropy and mode collapse, watched against the model training started from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft_plugins import on_demand

if TYPE_CHECKING:
    from sft_plugins.collapse.callback import ModeCollapseCallback as ModeCollapseCallback
    from sft_plugins.collapse.detect.verdict import DetectorConfig as DetectorConfig
    from sft_plugins.collapse.detect.verdict import Finding as Finding
    from sft_plugins.collapse.detect.verdict import Verdict as Verdict
    from sft_plugins.collapse.probe.prompts import load_prompts as load_prompts
    from sft_plugins.collapse.report.page import write_report as write_report
    from sft_plugins.collapse.softening.soften import Softened as Softened
    from sft_plugins.collapse.softening.soften import soften as soften

    # For the command line, which looks behind no face; no public names.
    from sft_plugins.collapse.history import read_history as read_history  # isort: skip
    from sft_plugins.collapse.report.page import page_context as page_context  # isort: skip
    from sft_plugins.collapse.report.summary import Report as Report  # isort: skip
    from sft_plugins.collapse.report.summary import summarise as summarise  # isort: skip
    from sft_plugins.collapse.softening.page import SOFTENING_COLUMNS as SOFTENING_COLUMNS  # isort: skip
    from sft_plugins.collapse.softening.page import softening_headline as softening_headline  # isort: skip
    from sft_plugins.collapse.softening.page import softening_page as softening_page  # isort: skip
    from sft_plugins.collapse.softening.page import softening_rows as softening_rows  # isort: skip

# A recorded run is read and shown without what training takes: torch, transformers' trainer.
_PUBLIC = {
    "callback": ("ModeCollapseCallback",),
    "detect.verdict": ("DetectorConfig", "Finding", "Verdict"),
    "probe.prompts": ("load_prompts",),
    "report.page": ("write_report",),
    "softening.soften": ("Softened", "soften"),
}
_INNER = {
    "history": ("read_history",),
    "report.page": ("page_context",),
    "report.summary": ("Report", "summarise"),
    "softening.page": ("SOFTENING_COLUMNS", "softening_headline", "softening_page", "softening_rows"),
}
__all__ = sorted(name for names in _PUBLIC.values() for name in names)
if not TYPE_CHECKING:  # which shall complain of any other name
    __getattr__, __dir__ = on_demand(__name__, _PUBLIC, _INNER)
