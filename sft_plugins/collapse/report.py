"""The page a person reads: from a run's history to one self-contained HTML file and a PNG of each picture.

    history.jsonl ── read_history ──► records ── summarise ──► Report (plain data) ── pictures, template ──► report.html

Invariant: the page holds nothing that is not in the history, loads nothing, and says in words what each figure means.
    What was not measured is said to be so, never drawn as zero.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sft_plugins.collapse import charts
from sft_plugins.collapse.charts import PAGE, PAPER, Series
from sft_plugins.collapse.history import plain, read_history

__all__ = ["Report", "summarise", "write_report"]

_OPENING_WORDS = 4
_SHOWN_PROMPTS = 8

HEADLINES = {
    "critical": "The model has collapsed: its answers have become nearly the same.",
    "warn": "The model's answers are narrowing more than fine-tuning should make them.",
    "info": "Healthy. The model's answers have narrowed somewhat, as fine-tuning does.",
    "ok": "Healthy. No narrowing was found.",
    "blind": "No verdict: the run could not be compared with the model it started from.",
}
# Statements of the detector after which "healthy" would be a claim about something it could not see.
_BLIND = {"no_baseline", "baseline_unusable", "no_embedder", "no_probe", "too_few_prompts", "one_sample"}

# name in the history → (what it is called, how it is printed, what it means)
KEY_FIGURES = {
    "diversity": (
        "Variety of answers",
        ".3f",
        "how differently the model answers one open prompt, by meaning; 0 = the same",
    ),
    "cross_similarity": (
        "Likeness across prompts",
        ".3f",
        "how alike answers to different prompts are; rises in collapse",
    ),
    "opening_share": ("Commonest opening", ".0%", "share of open answers that begin with the same words"),
    "duplicates": ("Answers given twice", ".0%", "share of answers that another prompt got word for word"),
    "boilerplate": ("Refusals and empty phrases", ".0%", "share of answers that say nothing about the prompt"),
    "entropy": ("Entropy", ".3f", "how open the next word is, in nats per token"),
    "entropy_first_8": ("Entropy, first 8 tokens", ".3f", "the same where an answer takes its course"),
    "heldout_loss": (
        "Held-out loss",
        ".3f",
        "how badly the model predicts answers it has not trained on, nats per token",
    ),
    "gap": ("Over-confidence", "+.3f", "held-out loss minus entropy: 0 when calibrated, above when too certain"),
    "kl_base_now": ("Lost support", ".3f", "how surprised the model now is by what it used to say, nats per token"),
    "distinct_2": ("Distinct word pairs", ".3f", "lexical variety; may rise while meaning collapses"),
    "self_bleu": ("Self-BLEU", ".1f", "how much answers share wording, 0 to 100"),
    "repetition": ("Repetition", ".1%", "four-token phrases repeated within an answer"),
    "truncated": ("Cut answers", ".0%", "answers that ran into the length limit"),
    "length": ("Length", ".0f", "tokens per answer"),
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page, as data."""

    status: str
    headline: str
    step: int
    run: dict[str, Any]
    findings: list[dict[str, Any]]
    pending: list[dict[str, Any]]
    figures: list[dict[str, Any]]
    retained: list[tuple[int, float, float, float]]
    """Step, diversity kept, lower and upper end."""
    curves: dict[str, list[tuple[int, float, float, float]]]
    losses: dict[str, list[tuple[int, float]]]
    walk: list[tuple[int, float, float]]
    map_base: list[tuple[float, float]]
    map_now: list[tuple[float, float]]
    positions_base: list[float | None]
    positions_now: list[float | None]
    trade: list[tuple[int, float, float]]
    openings: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    problems: list[dict[str, Any]]
    cost: dict[str, Any] | None
    first_alarm: int | None
    """Step of the first confirmed `warn` or `critical`."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return plain(dataclasses.asdict(self))


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
    pictures: list[dict[str, str]] = []
    if find_spec("matplotlib"):
        for name, title, words, draw in _pictures(report):
            charts.save_png(draw(PAPER), folder / f"{name}.png")
            pictures.append({"title": title, "words": words, "svg": charts.to_svg(draw(PAGE))})
    page = folder / "report.html"
    page.write_text(_render(report, pictures), encoding="utf-8")
    return page


def summarise(records: Sequence[Mapping[str, Any]]) -> Report:
    """What the page says, from the records of one run (`read_history`)."""
    run = dict([r for r in records if r["kind"] == "run"][-1])
    base = next((r for r in records if r["kind"] == "baseline"), None)
    probes = [r for r in records if r["kind"] == "probe"]
    full = [r for r in probes if r.get("measures")]
    last = full[-1] if full else None
    verdict: Mapping[str, Any] = last["verdict"] if last else {"level": "ok", "findings": [], "pending": []}
    findings = list(verdict["findings"])
    blind = last is None or base is None or any(f["code"] in _BLIND for f in findings)
    status = "blind" if blind and verdict["level"] in ("ok", "info") else verdict["level"]
    alarms = [r["step"] for r in full if r["verdict"]["level"] in ("warn", "critical")]
    end = next((r for r in reversed(records) if r["kind"] == "end"), None)
    retained = _intervals(full, "diversity_retained")
    loss_at = {r["step"]: r["heldout_loss"] for r in probes if r.get("heldout_loss") is not None}
    logs = [r for r in records if r["kind"] == "log"]
    for r in logs:
        if r.get("eval_loss") is not None:
            loss_at.setdefault(r["step"], r["eval_loss"])
    trade = [(s, loss_at[s], kept) for s, kept, _, _ in retained if s in loss_at]
    if base is not None and base.get("heldout_loss") is not None:
        trade.insert(0, (0, base["heldout_loss"], 1.0))
    return Report(
        status=status,
        headline=HEADLINES[status],
        step=max((r["step"] for r in records), default=0),
        run=run,
        findings=findings,
        pending=list(verdict["pending"]),
        figures=_table(base, last or (probes[-1] if probes else None)),
        retained=retained,
        curves={name: _intervals(probes, name) for name in ("fork_retention", "closed_diversity_retained")},
        losses={
            "training": [(r["step"], r["loss"]) for r in logs if r.get("loss") is not None],
            "held out": sorted(loss_at.items()),
        },
        walk=_walk([r for r in (base, *full) if r is not None]),
        map_base=_points(base),
        map_now=_points(last),
        positions_base=list(base["by_position"]) if base else [],
        positions_now=list(probes[-1]["by_position"]) if probes else [],
        trade=trade,
        openings=_openings(run, base, last),
        samples=_samples(run, base, last),
        problems=[dict(r) for r in records if r["kind"] == "problem"],
        cost=None if end is None else {**end["cost"], "budget": end.get("budget")},
        first_alarm=alarms[0] if alarms else None,
    )


def _intervals(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float, float, float]]:
    found = [(r["step"], r.get("intervals", {}).get(name)) for r in records]
    return [(step, *values) for step, values in found if values is not None and None not in values]


def _table(base: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    rows = []
    before = {} if base is None else base["values"]
    after = {} if now is None else now["values"]
    for name, (title, form, words) in KEY_FIGURES.items():
        if before.get(name) is not None or after.get(name) is not None:
            rows.append(
                {
                    "title": title,
                    "words": words,
                    "base": None if before.get(name) is None else format(before[name], form),
                    "now": None if after.get(name) is None else format(after[name], form),
                }
            )
    return rows


def _across(record: Mapping[str, Any]) -> np.ndarray | None:
    """Per open prompt, 1 − mean cosine with the answers to the other open prompts."""
    cross = record["measures"]["cross_similarity"]
    if cross is None:
        return None
    matrix = np.array(cross, dtype=np.float64)
    opened = np.array([tag == "open" for tag in record["measures"]["tags"]])
    matrix[:, ~opened] = np.nan
    counts = np.isfinite(matrix).sum(axis=1)
    return np.where(opened & (counts > 0), 1 - np.nansum(matrix, axis=1) / np.maximum(counts, 1), np.nan)


def _points(record: Mapping[str, Any] | None) -> list[tuple[float, float]]:
    across = None if record is None or not record.get("measures") else _across(record)
    if record is None or across is None:
        return []
    within = np.array(record["measures"]["per_prompt"]["semantic_distance"], dtype=np.float64)
    return [(float(w), float(a)) for w, a in zip(within, across, strict=True) if np.isfinite(w) and np.isfinite(a)]


def _walk(records: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    steps = [(r["step"], _points(r)) for r in records]
    return [(step, *map(float, np.mean(points, axis=0))) for step, points in steps if points]


def _texts(record: Mapping[str, Any] | None) -> list[list[str]]:
    return [] if record is None else [[s["text"] for s in group] for group in record["samples"]]


def _openings(
    run: Mapping[str, Any], base: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The commonest first words of open answers, now, with their share before."""

    def shares(record: Mapping[str, Any] | None) -> Counter[str]:
        groups = [g for g, p in zip(_texts(record), run["prompts"], strict=False) if p["tag"] == "open"]
        words = [" ".join(text.split()[:_OPENING_WORDS]) for group in groups for text in group if text.strip()]
        return Counter({w: n / len(words) for w, n in Counter(words).items()})

    before, after = shares(base), shares(now)
    leading = [words for words, _ in (after or before).most_common(8)]
    return [{"words": words, "base": before[words], "now": after[words]} for words in leading]


def _samples(
    run: Mapping[str, Any], base: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Answers side by side, prompts that lost most variety first; two of each are open on the page."""
    before, after = _texts(base), _texts(now)

    def lost(p: int) -> float:
        figures = [
            np.nan if r is None or not r.get("measures") else r["measures"]["per_prompt"]["semantic_distance"][p]
            for r in (base, now)
        ]
        change = np.array(figures, dtype=np.float64)
        return float(change[1] - change[0]) if np.isfinite(change).all() else 0.0

    order = sorted(range(len(run["prompts"])), key=lambda p: (run["prompts"][p]["tag"] != "open", lost(p), p))
    chosen = order[: _SHOWN_PROMPTS - 2] + [p for p in order if run["prompts"][p]["tag"] == "closed"][:2]
    return [
        {
            "prompt": run["prompts"][p]["text"],
            "tag": run["prompts"][p]["tag"],
            "base": before[p] if p < len(before) else [],
            "now": after[p] if p < len(after) else [],
        }
        for p in dict.fromkeys(chosen)
    ]


def _line(name: str, points: Sequence[tuple[int, float]]) -> Series:
    steps, values = zip(*points, strict=True)
    return Series(name, steps, values, of_baseline=name == "training")


def _pictures(report: Report) -> list[tuple[str, str, str, Any]]:
    """(file name, title, what it shows, function of a palette) of every picture there is data for."""
    bands = report.run["detector"]
    made: list[tuple[str, str, str, Any]] = []

    def add(name: str, title: str, words: str, draw: Any) -> None:
        made.append((name, title, words, draw))

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
            lambda c: charts.positions(report.positions_now, report.positions_base, step=report.step, colours=c),
        )
    if len(report.trade) > 1:
        add(
            "trade",
            "Variety against loss",
            "From step to step. To the left: better on held-out answers. Down: narrower. Straight down is loss for nothing.",
            lambda c: charts.path(report.trade, colours=c),
        )
    return made


def _render(report: Report, pictures: Sequence[Mapping[str, str]]) -> str:
    import jinja2

    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(report=report, pictures=pictures, drawn=bool(find_spec("matplotlib")))
