"""The trade-off as a person reads it: rows of a table, two pictures, one page.

Invariant: the page holds nothing that is not in the `Softened`; what was not measured is "–", never 0.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from sft_plugins._report import render_page
from sft_plugins.collapse.detect.bootstrap import Estimate
from sft_plugins.collapse.detect.verdict import percent
from sft_plugins.collapse.report import charts
from sft_plugins.collapse.report.charts import PAGE, Palette, Series
from sft_plugins.collapse.softening.soften import Softened
from sft_plugins.collapse.softening.tradeoff import Place, Tradeoff

__all__ = ["SOFTENING_COLUMNS", "softening_headline", "softening_page", "softening_rows"]

_HEADLINES = {
    "recommended": "Take λ = {share:g}: the largest share of the training that is healthy at no more held-out loss.",
    "as_trained": "Healthy as trained: there is nothing to soften.",
    "none": "Softening does not mend this run.",
    "blind": "No recommendation: something that it rests on could not be measured.",
}
SOFTENING_COLUMNS = (
    "λ",
    "held-out loss (95%)",
    "change, paired",
    "variety kept (95%)",
    "reasoning kept",
    "fork entropy kept",
    "level",
)


def softening_headline(tradeoff: Tradeoff) -> str:
    """The outcome in one sentence."""
    return _HEADLINES[tradeoff.outcome].format(share=tradeoff.recommended or 0)


def softening_rows(tradeoff: Tradeoff) -> list[list[str]]:
    """The cells of each λ, under `SOFTENING_COLUMNS`."""
    return [
        [
            f"{place.share:g}",
            _number(place.loss),
            "–" if place.loss_change is None or place.share == 1 else _number(place.loss_change, sign="+"),
            _share(place.diversity),
            _share(place.reasoning),
            _share(place.forks),
            _level(place),
        ]
        for place in tradeoff.places
    ]


def softening_page(found: Softened) -> str:
    """The page's HTML."""
    drawn = bool(find_spec("matplotlib"))
    return render_page(
        "collapse/softening/soften.html.j2",
        found=found,
        headline=softening_headline(found.tradeoff),
        columns=SOFTENING_COLUMNS,
        rows=softening_rows(found.tradeoff),
        pictures=[(title, words, charts.to_svg(figure)) for title, words, figure in _pictures(found.tradeoff, PAGE)]
        if drawn
        else [],
        drawn=drawn,
    )


def _pictures(tradeoff: Tradeoff, colours: Palette) -> list[tuple[str, str, Any]]:
    made = []
    both = [(place, place.loss, place.diversity) for place in tradeoff.places]
    points = [(f"λ = {p.share:g}", _interval(x), _interval(y)) for p, x, y in both if x is not None and y is not None]
    limit = tradeoff.places[0].loss
    if points and limit is not None:
        chosen = None if tradeoff.recommended is None else f"λ = {tradeoff.recommended:g}"
        figure = charts.frontier(
            points, chosen=chosen, limit=limit.hi, band=(tradeoff.bands.warn_below, "warn"), colours=colours
        )
        words = (
            "Up: more of the base's variety. Left: better on held-out answers. To the right of the upright line training is "
            "given up; below the other one answers are narrower than ordinary fine-tuning leaves them."
        )
        made.append(("Variety against loss", words, figure))
    names = {"variety": "diversity", "reasoning": "reasoning", "fork entropy": "forks"}
    lines = []
    for number, (name, field) in enumerate(names.items()):
        found = [(p.share, e) for p in reversed(tradeoff.places) if (e := getattr(p, field)) is not None]
        if len(found) > 1:
            steps, estimates = [share for share, _ in found], [e for _, e in found]
            sides = ([e.value for e in estimates], [e.lo for e in estimates], [e.hi for e in estimates])
            lines.append(Series(name, steps, *sides, of_baseline=number > 0))
    if lines:
        bands = [(1.0, "base", "base"), (tradeoff.bands.warn_below, "warn", "warn")]
        figure = charts.curve(
            lines, ylabel="share kept", colours=colours, bands=bands, xlabel="λ, share of the training"
        )
        made.append(
            ("What is kept at each λ", "Of what the base has, with 95% intervals. λ = 1 is as trained.", figure)
        )
    return made


def _interval(e: Estimate) -> tuple[float, float, float]:
    return e.value, e.lo, e.hi


def _number(e: Estimate | None, *, sign: str = "") -> str:
    return "–" if e is None else f"{e.value:{sign}.3f} ({e.lo:{sign}.3f} to {e.hi:{sign}.3f})"


def _share(e: Estimate | None) -> str:
    return "–" if e is None else f"{percent(e.value)} ({percent(e.lo)} to {percent(e.hi)})"


def _level(place: Place) -> str:
    codes = [code.replace("_", " ") for code in place.codes]
    return ", ".join([place.level, *codes]) if place.level != "ok" else "ok"
