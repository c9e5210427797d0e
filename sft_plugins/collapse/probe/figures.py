"""From a look to numbers with names: what the loggers show, and what the detector decides on.

Invariant: a figure that does not exist is left out, never logged as 0 (C6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sft_plugins.collapse.detect.bootstrap import Estimate
from sft_plugins.collapse.detect.verdict import Probe
from sft_plugins.collapse.metrics.entropy import compare, fork_positions, grouped_sums, kl_from_cached, summarize
from sft_plugins.collapse.metrics.per_prompt import Measures
from sft_plugins.collapse.probe.probe import Look
from sft_plugins.collapse.probe.teacher_forcing import Judged

__all__ = ["PREFIX", "by_position", "figures", "flatten", "probe_from_record", "to_probe", "trainer_figures"]

PREFIX = "collapse/"
_FIRST = 8
_POSITIONS = 32
# What is averaged over open prompts only: variety and sameness. The rest is asked of all.
_OPEN = ("semantic_distance", "vendi", "clusters", "unique", "self_bleu", "distinct_1", "distinct_2")
_ACROSS = ("opening_share", "opening_information", "duplicates")
_ALL = ("boilerplate", "empty", "truncated", "repetition", "length")


def to_probe(look: Look, base: Look | None, *, step: int) -> Probe:
    """What the detector takes. The baseline itself is `to_probe(base, base, step=0)`."""
    now, before = _forks_in(look), None if base is None else _forks_in(base)
    fork_entropy = fork_entropy_base = None
    if now is not None and before is not None:
        forks = fork_positions(before.stats.entropy)
        count = int(before.row.max()) + 1 if len(before.row) else 0
        both = forks & now.stats.finite & before.stats.finite
        fork_entropy = grouped_sums(now.stats.entropy, now.row, count, where=both)
        fork_entropy_base = grouped_sums(before.stats.entropy, before.row, count, where=both)
    judged = [j for j in (look.held_out, look.frozen) if j is not None]
    return Probe(
        step=step,
        measures=look.measures,
        out_of_range=look.out_of_range,
        fork_entropy=fork_entropy,
        fork_entropy_base=fork_entropy_base,
        heldout_loss=None if look.held_out is None else summarize(look.held_out.stats).nll,
        nonfinite=sum(int((~j.stats.finite).sum()) for j in judged),
    )


def probe_from_record(record: Mapping[str, Any]) -> Probe:
    """The detector's view of a `probe` or `baseline` record of the history."""
    measures = record.get("measures")
    forks, forks_base = (
        None if sums is None else np.array(sums, dtype=np.float64)
        for sums in (record.get("fork_entropy"), record.get("fork_entropy_base"))
    )
    return Probe(
        step=record["step"],
        measures=None if measures is None else Measures.from_json(measures),
        out_of_range=record.get("out_of_range"),
        fork_entropy=forks,
        fork_entropy_base=forks_base,
        heldout_loss=record.get("heldout_loss"),
        nonfinite=record.get("nonfinite", 0),
    )


def _forks_in(look: Look) -> Judged | None:
    """Forks are sought in the held-out answers, or where there are none in what the baseline said itself."""
    return look.held_out if look.held_out is not None else look.frozen


def figures(look: Look, base: Look | None) -> dict[str, float]:
    """Point values by name, in nats, shares, tokens or cosines as the name's table in the docs says."""
    found: dict[str, float | None] = {}
    judged = _forks_in(look)
    if judged is not None:
        summary = summarize(judged.stats, offsets=judged.offset, first=_FIRST)
        found |= {
            "entropy": summary.entropy,
            "top1": summary.top1,
            "kl_now_base": summary.kl_now_base,
            "entropy_rest": summary.entropy_rest,
        }
        opening = judged.stats.entropy[judged.stats.finite & (judged.offset < _FIRST)]
        found["entropy_first_8"] = float(opening.double().mean()) if len(opening) else None
        if look.held_out is not None:  # its own samples say nothing about right and wrong
            found |= {"heldout_loss": summary.nll, "gap": summary.gap}
        before = None if base is None else _forks_in(base)
        if before is not None:
            compared = compare(judged.stats, before.stats)
            found |= {"entropy_ratio": compared.entropy_ratio, "fork_retention": compared.fork_retention}
    if look.frozen is not None and base is not None and base.frozen is not None:
        found["kl_base_now"] = kl_from_cached(-base.frozen.stats.nll, -look.frozen.stats.nll)
    if look.measures is not None:
        found |= _of_answers(look.measures)
        if base is not None and base.measures is not None:
            length = base.measures.mean("length")
            now = look.measures.mean("length")
            found["length_ratio"] = now / length if now is not None and length else None
        reasoned = [
            m.mean("reasoning") for m in (look.measures, None if base is None else base.measures) if m is not None
        ]
        if any(reasoned):  # a model that never reasons has no share to tell
            found |= {name: look.measures.mean(name) for name in ("reasoning", "reasoning_length")}
    if look.reading is not None:
        found["unknown_tokens"] = look.reading.unknown
    return {name: float(value) for name, value in found.items() if value is not None and np.isfinite(value)}


def _of_answers(measures: Measures) -> dict[str, float | None]:
    found = {name: measures.mean(name, only_open=True) for name in _OPEN}
    found |= {name: measures.mean(name) for name in (*_ACROSS, *_ALL)}
    if measures.cross_similarity is not None:
        opened = measures.is_open
        across = measures.cross_similarity[np.ix_(opened, opened)]
        across = across[np.isfinite(across)]
        found["cross_similarity"] = float(across.mean()) if len(across) else None
    found["diversity"] = found.pop("semantic_distance")
    return found


def by_position(look: Look) -> list[float | None]:
    """Mean entropy in nats at the 1st … 32nd token of the answers that `entropy` rests on."""
    judged = _forks_in(look)
    return (
        []
        if judged is None
        else list(summarize(judged.stats, offsets=judged.offset, first=_POSITIONS).entropy_by_position)
    )


def flatten(values: Mapping[str, float], estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """`collapse/<name>`, with `_lo` and `_hi` where there is an interval: what goes to the trainer's loggers."""
    flat = {PREFIX + name: value for name, value in values.items()}
    for name, e in estimates.items():
        flat |= {PREFIX + name: e.value, f"{PREFIX}{name}_lo": e.lo, f"{PREFIX}{name}_hi": e.hi}
    return {name: float(value) for name, value in flat.items() if np.isfinite(value)}


def trainer_figures(logs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Tier 0, from what the trainer has logged: slope of its entropy per 100 steps, evaluation loss − evaluation
    entropy.

    The slope is the least-squares line through the newer half of the entropies (8 of them at least).
    """
    found = {}
    points = [(r["step"], r["entropy"]) for r in logs if r.get("entropy") is not None]
    points = points[-max(8, len(points) // 2) :]
    if len(points) >= 8 and len({step for step, _ in points}) > 1:
        steps, values = np.array(points, dtype=np.float64).T
        found["trainer_entropy_slope"] = float(100 * np.polyfit(steps, values, 1)[0])
    for record in reversed(logs):
        if record.get("eval_loss") is not None and record.get("eval_entropy") is not None:
            found["trainer_gap"] = float(record["eval_loss"] - record["eval_entropy"])
            break
    return found
