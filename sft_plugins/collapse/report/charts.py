"""The report's pictures, each from plain numbers, drawn once for the page and once as PNG.

On the page a picture is inline SVG whose colours are CSS variables, so it follows the reader's light or dark setting;
text stays text. Figures are small (about 4 × 3 inches) and laid out by the page, so they read on a phone as on a wide
screen. No pyplot: nothing global is touched in a process that trains.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "PAGE",
    "PAPER",
    "Palette",
    "Series",
    "curve",
    "diversity_map",
    "frontier",
    "path",
    "positions",
    "save_png",
    "to_svg",
]

SIZE = (4.4, 2.9)
Point = tuple[float, float]
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Palette:
    """Colours by role."""

    ink: str
    faint: str
    now: str
    base: str
    warn: str
    critical: str


PAPER = Palette("#222222", "#bbbbbb", "#2563a8", "#888888", "#c98500", "#c0392b")
# No two alike and none that matplotlib would write by itself: each is replaced by its variable in the SVG.
PAGE = Palette("#010203", "#010204", "#010205", "#010206", "#010207", "#010208")
_VARIABLES = {getattr(PAGE, name): f"var(--{name})" for name in ("ink", "faint", "now", "base", "warn", "critical")}


@dataclass(frozen=True)
class Series:
    """One line: values by step, and an interval where there is one."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    lo: Sequence[float] | None = None
    hi: Sequence[float] | None = None
    of_baseline: bool = False


def curve(
    series: Sequence[Series],
    *,
    ylabel: str,
    colours: Palette,
    bands: Sequence[tuple[float, str, str]] = (),
    xlabel: str = "training step",
) -> Any:
    """Lines over training steps, or over `xlabel`. `bands` are levels `(value, words, role)` drawn across."""
    figure, axes = _axes(colours)
    for value, words, role in bands:
        axes.axhline(value, color=getattr(colours, role), linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            words, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
            ha="right", va="bottom", fontsize=8, color=getattr(colours, role),
        )  # fmt: skip
    for one in series:
        colour = colours.base if one.of_baseline else colours.now
        if one.lo is not None and one.hi is not None:
            axes.fill_between(one.steps, one.lo, one.hi, color=colour, alpha=0.18, linewidth=0)
        axes.plot(one.steps, one.values, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=one.label)
    axes.set_xlabel(xlabel)
    if xlabel == "training step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(ylabel)
    axes.margins(y=0.15)
    if len(series) > 1:
        _legend(axes, colours)
    return figure


def diversity_map(
    walk: Sequence[tuple[int, float, float]], *, base: Sequence[Point], now: Sequence[Point], colours: Palette
) -> Any:
    """Where the model is between "varied" (top right) and "one answer to everything" (bottom left).

    Args:
        walk: step, diversity within prompts, diversity across prompts, of the baseline and every probe.
        base, now: the same two figures of each prompt, at the baseline and at the last probe.
    """
    figure, axes = _axes(colours)
    for points, colour in ((base, colours.base), (now, colours.now)):
        if points:
            axes.scatter(*zip(*points, strict=True), s=9, color=colour, alpha=0.35, linewidth=0)
    steps, within, across = zip(*walk, strict=True)
    axes.plot(within, across, color=colours.ink, linewidth=1.4)
    axes.scatter(within[:1], across[:1], s=55, color=colours.base, zorder=3, label="before training")
    axes.scatter(within[-1:], across[-1:], s=55, color=colours.now, zorder=3, label=f"step {steps[-1]}")
    axes.set_xlabel("variety within a prompt")
    axes.set_ylabel("variety across prompts")
    axes.margins(0.15)
    # From 0, the collapsed corner: on axes cut to the data, chance would look like a journey.
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _legend(axes, colours)
    return figure


def positions(now: Sequence[float | None], base: Sequence[float | None], *, step: int, colours: Palette) -> Any:
    """Mean entropy at each place of an answer, now against the baseline."""
    figure, axes = _axes(colours)
    for values, colour, label in ((base, colours.base, "before training"), (now, colours.now, f"step {step}")):
        places = [i + 1 for i, v in enumerate(values) if v is not None]
        if places:
            axes.plot(places, [v for v in values if v is not None], color=colour, linewidth=1.6, label=label)
    axes.set_xlabel("token of the answer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("entropy (nats)")
    axes.set_ylim(bottom=0)
    _legend(axes, colours)
    return figure


def path(walk: Sequence[tuple[int, float, float]], *, colours: Palette) -> Any:
    """Retained diversity against held-out loss, step by step: down and left is a trade, straight down is loss for
    nothing.
    """
    figure, axes = _axes(colours)
    steps, loss, kept = zip(*walk, strict=True)
    axes.plot(loss, kept, color=colours.now, linewidth=1.4, marker="o", markersize=3.5)
    for i in sorted({0, len(steps) - 1}):
        axes.annotate(
            f"step {steps[i]}",
            (loss[i], kept[i]),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=9,
            color=colours.ink,
        )
    axes.set_xlabel("held-out loss (nats per token)")
    axes.set_ylabel("diversity kept")
    axes.margins(0.2)
    return figure


def frontier(
    points: Sequence[tuple[str, Interval, Interval]],
    *,
    chosen: str | None,
    limit: float,
    band: tuple[float, str],
    colours: Palette,
) -> Any:
    """Variety kept against held-out loss, a cross of intervals at each point: up is more varied, left is better.

    Args:
        points: name, `(value, lo, hi)` of the loss, the same of the variety kept.
        chosen: the name of the point to take.
        limit: the loss up to which nothing of training is given up; `band`: the lowest healthy variety, and its name.
    """
    figure, axes = _axes(colours)
    axes.axvline(limit, color=colours.base, linewidth=1, linestyle=(0, (4, 3)))
    axes.axhline(band[0], color=colours.warn, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        band[1], (1, band[0]), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
        ha="right", va="bottom", fontsize=8, color=colours.warn,
    )  # fmt: skip
    axes.plot([x[0] for _, x, _ in points], [y[0] for _, _, y in points], color=colours.base, linewidth=1)
    for name, (x, x_lo, x_hi), (y, y_lo, y_hi) in points:
        axes.plot([x_lo, x_hi], [y, y], color=colours.now, linewidth=1, alpha=0.5)
        axes.plot([x, x], [y_lo, y_hi], color=colours.now, linewidth=1, alpha=0.5)
        axes.plot([x], [y], marker="o", markersize=8 if name == chosen else 4, color=colours.now)
        axes.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=9, color=colours.ink)
    axes.set_xlabel("held-out loss (nats per token)")
    axes.set_ylabel("variety kept")
    axes.margins(0.15)
    return figure


def to_svg(figure: Any) -> str:
    """An inline `<svg>` that fills its container and takes its colours from the page."""
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt makes the ids, and so the page, the same for the same numbers.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sft-plugins"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r"font(-family)?: ([0-9.]+px )[^;\"]*", r"font: \2var(--font)", text)


def save_png(figure: Any, path: Path) -> None:
    """The same picture on white, 160 dots per inch."""
    figure.savefig(path, dpi=160, facecolor="white")


def _axes(colours: Palette) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.tick_params(colors=colours.ink, labelsize=9, length=3)
    axes.grid(True, color=colours.faint, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(colours.faint)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(colours.ink)
        text.set_fontsize(10)
    return figure, axes


def _legend(axes: Any, colours: Palette) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, labelcolor=colours.ink, loc="best")
