"""The page a person reads: from a run's history to one self-contained HTML file and a PNG of each picture.

    history.jsonl ── read_history ──► records ── summarise ──► Report (plain data) ── pictures, template ──► report.html

Invariant: the page holds nothing that is not in the history, loads nothing, and says in words what each figure means.
    What was not measured is said to be so, never drawn as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from sft_plugins._report import render_page
from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.report import charts
from sft_plugins.collapse.report.charts import PAGE, PAPER, Palette, Series
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


class Picture(NamedTuple):
    """One picture: its file's `name`, `words` that say what it shows, `draw` to make a matplotlib figure in given colours."""

    name: str
    title: str
    words: str
    draw: Callable[[Palette], Any]


def pictures(report: Report) -> list[Picture]:
    """Every picture there is data for."""
    bands = report.run["detector"]
    made: list[Picture] = []

    def add(name: str, title: str, words: str, draw: Any) -> None:
        made.append(Picture(name, title, words, draw))

    def banded(rows: Sequence[tuple[int, float, float, float]], label: str) -> Series:
        steps, values, lo, hi = zip(*[(0, 1.0, 1.0, 1.0), *rows], strict=True)
        return Series(label, steps, values, lo, hi)

    if report.retained:
        lines = [
            (1.0, "before training", "base"),
            (bands["warn_below"], "warn", "warn"),
            (bands["critical_below"], "critical", "critical"),
        ]
        add(
            "diversity",
            "Variety kept",
            "How much of its variety of meaning the model keeps on open prompts, with 95% intervals. An alarm needs the "
            "whole interval below a line, twice in a row.",
            lambda c: charts.curve(
                [banded(report.retained, "open prompts")], ylabel="share kept", colours=c, bands=lines
            ),
        )
    if report.curves["fork_retention"]:
        add(
            "forks",
            "Openness at the forks",
            "Entropy where the model had a real choice before training (its most open fifth of tokens), as a share of what "
            "it was.",
            lambda c: charts.curve(
                [banded(report.curves["fork_retention"], "forks")],
                ylabel="share kept",
                colours=c,
                bands=[(1.0, "before training", "base"), (bands["fork_below"], "corroborates", "warn")],
            ),
        )
    if any(report.losses.values()):
        add(
            "losses",
            "Loss",
            "What training buys. Narrowing while held-out loss no longer falls is a price without a return.",
            lambda c: charts.curve(
                [_line(name, points) for name, points in report.losses.items() if points],
                ylabel="nats per token",
                colours=c,
            ),
        )
    if len(report.walk) > 1:
        add(
            "map",
            "Map of variety",
            "Each dot is a prompt, grey before training, coloured now. Left: answers to one prompt agree. Down: answers to "
            "different prompts agree. The bottom left corner is one answer to everything.",
            lambda c: charts.diversity_map(report.walk, base=report.map_base, now=report.map_now, colours=c),
        )
    if any(v is not None for v in report.positions_now):
        add(
            "positions",
            "Where in an answer",
            "Entropy at the 1st, 2nd, … token. The first tokens choose an answer's course; there collapse shows first.",
            lambda c: charts.positions(report.positions_now, report.positions_base, step=report.looked_at, colours=c),
        )
    if len(report.trade) > 1:
        add(
            "trade",
            "Variety against loss",
            "From step to step. To the left: better on held-out answers. Down: narrower. Straight down is loss for nothing.",
            lambda c: charts.path(report.trade, colours=c),
        )
    return made


def _line(name: str, points: Sequence[tuple[int, float]]) -> Series:
    steps, values = zip(*points, strict=True)
    return Series(name, steps, values, of_baseline=name == "training")
