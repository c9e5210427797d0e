"""The page a person reads: from a run's history to one self-contained HTML file and a PNG of each picture.

    history.jsonl ── read_history ──► records ── summarise ──► Report (plain data) ── pictures, template ──► report.html

Invariant: the page holds nothing that is not in the history, loads nothing, and says in words what each figure means.
    What was not measured is said to be so, never drawn as zero.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sft_plugins._html import render_page
from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.report import charts
from sft_plugins.collapse.report.charts import PAGE, PAPER
from sft_plugins.collapse.report.pictures import pictures
from sft_plugins.collapse.report.summary import Report, summarise

__all__ = ["page_context", "write_report"]


def write_report(history_path: str | Path, output_dir: str | Path | None = None) -> Path:
    """Write `report.html` and one PNG per picture, and return the page's path.

    Without matplotlib (extra `report`) the page has its words, tables and samples, and says what is missing.

    Args:
        history_path: a run's `history.jsonl`.
        output_dir: by default the folder of the history.

    Raises:
        CollapseError: `history_file`, when the history cannot be read or holds no run.
        OSError: when the folder cannot be written.
    """
    history_path = Path(history_path)
    folder = Path(output_dir) if output_dir is not None else history_path.parent
    folder.mkdir(parents=True, exist_ok=True)
    report = summarise(read_history(history_path))
    if find_spec("matplotlib"):
        for picture in pictures(report):
            charts.save_png(picture.draw(PAPER), folder / f"{picture.name}.png")
    page = folder / "report.html"
    page.write_text(render_page("collapse/report/report.html.j2", **page_context(report)), encoding="utf-8")
    return page


def page_context(report: Report) -> dict[str, Any]:
    """What `collapse/report/run.html.j2` is rendered with: `report`, its `pictures` as SVG, whether any are `drawn`."""
    drawn = bool(find_spec("matplotlib"))
    made = [
        {"title": picture.title, "words": picture.words, "svg": charts.to_svg(picture.draw(PAGE))}
        for picture in (pictures(report) if drawn else ())
    ]
    return {"report": report, "pictures": made, "drawn": drawn}
