"""Which pictures a report has, what each is called and says, and from which of its numbers it is drawn (`charts.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sft_plugins.collapse.report import charts
from sft_plugins.collapse.report.charts import Palette, Series
from sft_plugins.collapse.report.summary import Report

__all__ = ["Picture", "pictures"]


class Picture(NamedTuple):
    """`name` is its file's, `words` say what it shows, `draw` makes a matplotlib figure in the colours given."""

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
