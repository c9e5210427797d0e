"""What a run's history comes to, as plain data: everything the report page says, before any word or picture.

    records (read_history) ── summarise ──► Report

Invariant: nothing is in a `Report` that is not in the history; what was not measured is None or left out, never 0.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_plugins._report import plain
from sft_plugins.collapse.detect.bootstrap import FEW_PROMPTS
from sft_plugins.collapse.detect.verdict import BLIND, NO_LEVEL, percent, rounded

__all__ = ["HEADLINES", "Report", "summarise"]

_OPENING_WORDS = 4
_SHOWN_PROMPTS = 8

HEADLINES = {
    "critical": "The model has collapsed: its answers have become nearly the same.",
    "warn": "The model's answers are narrowing more than fine-tuning should make them.",
    "info": "Healthy. The model's answers have narrowed somewhat, as fine-tuning does.",
    "ok": "Healthy. No narrowing was found.",
    "unconfirmed": "Not confirmed yet: the last look found an alarm that the one before it had not.",
    "reasoning": "The model reasons less than it did before training.",
    "blind": "No verdict: the run could not be compared with the model it started from.",
}

# name in the history → (what it is called, how it is printed, what it means)
KEY_FIGURES = {
    "diversity": ("Variety of answers", ".3f", "how differently the model answers one open prompt, by meaning; 0 = the same"),
    "cross_similarity": ("Likeness across prompts", ".3f", "how alike answers to different prompts are; rises in collapse"),
    "opening_share": ("Commonest opening", ".0%", "share of open answers that begin with the same words"),
    "duplicates": ("Answers given twice", ".0%", "share of answers that another prompt got word for word"),
    "boilerplate": ("Refusals and empty phrases", ".0%", "share of answers that say nothing about the prompt"),
    "entropy": ("Entropy", ".3f", "how open the next word is, in nats per token"),
    "entropy_first_8": ("Entropy, first 8 tokens", ".3f", "the same where an answer takes its course"),
    "heldout_loss": ("Held-out loss", ".3f", "how badly the model predicts answers it has not trained on, nats per token"),
    "gap": ("Over-confidence", "+.3f", "held-out loss minus entropy: 0 when calibrated, above when too certain"),
    "kl_base_now": ("Lost support", ".3f", "how surprised the model now is by what it used to say, nats per token"),
    "distinct_2": ("Distinct word pairs", ".3f", "lexical variety; may rise while meaning collapses"),
    "self_bleu": ("Self-BLEU", ".1f", "how much answers share wording, 0 to 100"),
    "repetition": ("Repetition", ".1%", "four-token phrases repeated within an answer"),
    "reasoning": ("Answers that reason", ".0%", "share of answers with reasoning in them; an empty block is none"),
    "reasoning_length": ("Length of reasoning", ".0f", "tokens of reasoning in the answers that reason"),
    "truncated": ("Cut answers", ".0%", "answers that ran into the length limit"),
    "length": ("Length", ".0f", "tokens per answer"),
    "unknown_tokens": ("Unread tokens", ".0%", "share of the answers' tokens that the ruler of meaning does not know"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page, as data."""

    status: str
    headline: str
    step: int
    """The last that the history knows."""
    looked_at: int
    """The step of the last probe."""
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

    @property
    def few_prompts(self) -> int | None:
        """How many open prompts there are, where they are too few for intervals to hold as often as they say."""
        asked = sum(prompt["tag"] == "open" for prompt in self.run["prompts"])
        return asked if asked < FEW_PROMPTS else None

    @property
    def kept(self) -> tuple[int, str, str, str] | None:
        """The last of `retained` as it is read: `(12, "52%", "40%", "61%")`; None where variety was never compared."""
        if not self.retained:
            return None
        step, *shares = self.retained[-1]
        value, lo, hi = map(percent, shares)
        return step, value, lo, hi

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return plain(dataclasses.asdict(self))


def summarise(records: Sequence[Mapping[str, Any]]) -> Report:
    """What the page says, from the records of one run (`read_history`)."""
    run = dict([r for r in records if r["kind"] == "run"][-1])
    base = next((r for r in records if r["kind"] == "baseline"), None)
    probes = [r for r in records if r["kind"] == "probe"]
    full = [r for r in probes if r.get("measures")]
    last = full[-1] if full else None
    verdict: Mapping[str, Any] = last["verdict"] if last else {"level": NO_LEVEL, "findings": [], "pending": []}
    findings = list(verdict["findings"])
    blind = last is None or base is None or any(f["code"] in BLIND for f in findings)
    status = verdict["level"]
    if status in ("ok", "info", NO_LEVEL):  # histories of 0.1.0 say "ok" where nothing was looked at
        alarming = any(f["level"] in ("warn", "critical") for f in verdict["pending"])
        status = "blind" if blind else "unconfirmed" if alarming else status
    alarms = [r["step"] for r in full if r["verdict"]["level"] in ("warn", "critical")]
    end = next((r for r in reversed(records) if r["kind"] == "end"), None)
    retained = _intervals(full, "diversity_retained")
    looks = [r for r in (base, *probes) if r is not None]
    loss_at = {r["step"]: r["heldout_loss"] for r in looks if r.get("heldout_loss") is not None}
    logs = [r for r in records if r["kind"] == "log"]
    for r in logs:
        if r.get("eval_loss") is not None:
            loss_at.setdefault(r["step"], r["eval_loss"])
    trade = [(s, loss_at[s], kept) for s, kept, _, _ in retained if s in loss_at]
    if base is not None and base.get("heldout_loss") is not None:
        trade.insert(0, (0, base["heldout_loss"], 1.0))
    return Report(
        status=status,
        headline=_headline(status, findings),
        step=max((r["step"] for r in records), default=0),
        looked_at=probes[-1]["step"] if probes else 0,
        run=run,
        findings=findings,
        pending=list(verdict["pending"]),
        figures=_table(base, last or (probes[-1] if probes else None)),
        retained=retained,
        curves={
            name: _intervals(probes, name) for name in ("fork_retention", "closed_diversity_retained", "reasoning_kept")
        },
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


def _headline(status: str, findings: Sequence[Mapping[str, Any]]) -> str:
    """What the highest finding says: an alarm need not be one of narrowing."""
    codes = {finding["code"] for finding in findings if finding["level"] == status}
    if "reasoning_lost" in codes and not codes & {"narrowing", "homogeneity", "tax_without_benefit"}:
        return HEADLINES["reasoning"]
    return HEADLINES[status]


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
                    "base": None if before.get(name) is None else rounded(before[name], form),
                    "now": None if after.get(name) is None else rounded(after[name], form),
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
