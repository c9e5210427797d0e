"""Decides from arrays alone whether a model has narrowed against its baseline; knows no model, no trainer, no clock.

Invariants
- Only *meaning* decides about narrowing: the retained `semantic_distance` of `open` prompts. Without embeddings there
  is no such alarm; lexical figures never stand in for it (C8).
- No single probe raises anything: a finding must hold at `persistence` consecutive probes, and is `pending` until then.
- `closed` prompts never alarm: few answers are right there.
- A missing or unusable baseline never reads as "all is well": the verdict then holds a finding that says so (`comparison.py`).

Levels and codes: `verdict.py`. Figures: `comparison.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from sft_plugins.collapse.detect.bootstrap import Estimate, holm, ratio
from sft_plugins.collapse.detect.comparison import NO_PROBE, estimate, limits_of_sight, obstacle, unusable
from sft_plugins.collapse.detect.verdict import (
    BLIND,
    LEVELS,
    NO_LEVEL,
    DetectorConfig,
    Finding,
    Probe,
    Verdict,
    percent,
)

__all__ = ["Detector", "detect"]

_INFORMATION_FLOOR = 0.05
"""Nats of prompt–opening information below which a baseline's openings are taken to tell nothing."""

_WITNESSES = {
    "fork_retention": "fork entropy is at {0.value:.0%} of the baseline's",
    "similarity_rise": "answers to different prompts are closer by {0.value:.2f} (cosine)",
    "opening_rise": "the commonest opening's share is up by {0.value:.0%}",
}

_ADVICE = {
    "info": "Nothing to do: fine-tuning narrows. Watch whether it goes on once held-out loss stops falling.",
    "warn": (
        "Average the weights with an early healthy checkpoint (WiSE-FT, arXiv 2504.10478), train fewer epochs, or "
        "broaden the data."
    ),
    "critical": (
        "Stop, and roll back to an early healthy checkpoint or average the weights with it (WiSE-FT, arXiv "
        "2504.10478). Then broaden the data, and lower epochs or learning rate."
    ),
    "homogeneity": (
        "Read the answers side by side. The data likely holds one safe answer many times: remove duplicates and "
        "boilerplate, and broaden it."
    ),
    "reasoning_lost": (
        "Look at the data: rows without reasoning, or with an empty <think></think>, teach the model to skip it. Give them "
        "the reasoning, mix in rows that have it, or train with the template's switch for answers without."
    ),
    "degeneration": (
        "Read the samples. Loops, answers without end and empty answers point at a missing stop token, at masking, or "
        "at a learning rate that is too high."
    ),
}


def detect(baseline: Probe | None, probes: Sequence[Probe], *, config: DetectorConfig | None = None) -> Verdict:
    """The verdict after the last of `probes`, which are in order of step.

    Only probes with tier 2 (`measures`) are looked at and count as consecutive. Pure: the same arrays give the same
    verdict, so a resumed run goes on from its history file.

    Raises:
        CollapseError: `prompts_changed`, when baseline and probes were not asked the same prompts.
    """
    detector = Detector(baseline, config=config)
    for probe in probes:
        detector.add(probe)
    return detector.verdict


class Detector:
    """A run judged as its probes come. What earlier ones showed is kept whole, so no length of run loses its past.

    Args:
        baseline: the model before training; without one `verdict` says so, whatever is added.
        config: bands, limits, persistence.
    """

    def __init__(self, baseline: Probe | None, *, config: DetectorConfig | None = None) -> None:
        self.baseline, self.config = baseline, config or DetectorConfig()
        self._obstacle = obstacle(baseline, self.config)
        self._probes: list[Probe] = []
        self._raw: list[list[Finding]] = []
        self._healthy_step: int | None = None
        self.verdict = Verdict(None, NO_LEVEL, (self._obstacle or NO_PROBE,), (), {}, None)
        """After the last probe with tier 2."""

    def add(self, probe: Probe) -> Verdict:
        """The verdict after `probe`, which comes after all that were added before. Without tier 2 it changes nothing.

        Raises:
            CollapseError: `prompts_changed`; nothing is added then.
        """
        if probe.measures is None:
            return self.verdict
        if self._obstacle is not None or self.baseline is None:
            self.verdict = Verdict(probe.step, NO_LEVEL, (self._obstacle or NO_PROBE,), (), {}, None)
            return self.verdict
        figures = estimate(self.baseline, probe, config=self.config)
        raw = _findings(self.baseline, [*self._probes, probe], figures, self.config)
        self._probes.append(probe)
        self._raw.append(raw)
        if _top(raw) in ("ok", "info"):
            self._healthy_step = probe.step
        confirmed, pending = _confirm(self._raw, self.config.persistence)
        confirmed = [_with_checkpoint(finding, self._healthy_step) for finding in confirmed]
        findings = (
            *sorted(confirmed, key=_rank, reverse=True),
            *limits_of_sight(self.baseline, probe, self.config),
        )
        level = _top(findings)
        if level in ("ok", "info") and any(finding.code in BLIND for finding in findings):
            level = NO_LEVEL
        self.verdict = Verdict(probe.step, level, findings, tuple(pending), figures, self._healthy_step)
        return self.verdict


def _findings(
    baseline: Probe, probes: Sequence[Probe], figures: Mapping[str, Estimate], config: DetectorConfig
) -> list[Finding]:
    """What the last of `probes` shows by itself, before persistence."""
    # Where the baseline's openings tell nothing about their prompts (every one is new), that cannot fall: then meaning
    # is asked instead, how much closer two answers to one prompt are than answers to different prompts.
    told = None if baseline.measures is None else baseline.measures.mean("opening_information")
    informed = (told or 0.0) > _INFORMATION_FLOOR
    fall = "information_change" if informed else "specificity_change"
    tested = {
        name: figures[name].p
        for name in ("diversity_retained", *_WITNESSES, fall)
        if name in figures and figures[name].clusters >= config.min_prompts
    }
    sure = {name for name, p in holm(tested).items() if p < config.alpha}
    found = [
        _narrowing(figures, sure, config),
        _homogeneity(figures, sure, fall),
        _reasoning_lost(figures, config),
        _tax_without_benefit(probes, config),
        _degeneration(probes[-1], config),
    ]
    return [finding for finding in found if finding is not None]


def _narrowing(figures: Mapping[str, Estimate], sure: set[str], config: DetectorConfig) -> Finding | None:
    if "diversity_retained" not in sure:
        return None
    kept = figures["diversity_retained"]
    evidence = (
        f"answers to open prompts keep {percent(kept.value)} of the baseline's semantic diversity "
        f"({config.confidence:.0%} interval {percent(kept.lo)}–{percent(kept.hi)}, {kept.clusters} prompts)"
    )
    witnesses = [words.format(figures[name]) for name, words in _WITNESSES.items() if name in sure]
    level = "warn" if kept.hi < config.warn_below else "info"
    if kept.hi < config.critical_below:
        level = "critical" if witnesses else "warn"
        evidence += f"; {' and '.join(witnesses) or 'critical by its size, but no second axis confirms it'}"
    return Finding(level, "narrowing", "diversity_retained", kept.value, kept.lo, kept.hi, evidence, _ADVICE[level])


def _homogeneity(figures: Mapping[str, Estimate], sure: set[str], fall: str) -> Finding | None:
    """Different prompts get the same answer: openings or similarity up, *and* answers say less about their prompt."""
    risen = [name for name in ("similarity_rise", "opening_rise") if name in sure]
    if not risen or fall not in sure:
        return None
    rise, lost = figures[risen[0]], -figures[fall].value
    evidence = " and ".join(_WITNESSES[name].format(figures[name]) for name in risen) + (
        f", while openings tell {lost:.2f} nats less about their prompt"
        if fall == "information_change"
        else f", while answers are less specific to their prompt by {lost:.2f} (cosine)"
    )
    return Finding("warn", "homogeneity", risen[0], rise.value, rise.lo, rise.hi, evidence, _ADVICE["homogeneity"])


def _reasoning_lost(figures: Mapping[str, Estimate], config: DetectorConfig) -> Finding | None:
    """Fewer answers reason, or they reason at less length. A family of tests of its own: what it asks is no variety."""
    asked = {
        name: figures[name].p
        for name in ("reasoning_kept", "reasoning_length_kept")
        if name in figures and figures[name].clusters >= config.min_prompts
    }
    sure = [name for name, p in holm(asked).items() if p < config.alpha]
    if not sure:
        return None

    def level(name: str) -> str:
        if name == "reasoning_length_kept":
            return "warn" if figures[name].hi < config.reasoning_length_below else "info"
        if figures[name].hi < config.reasoning_critical_below:
            return "critical"
        return "warn" if figures[name].hi < config.reasoning_warn_below else "info"

    worst = max(sorted(sure), key=lambda name: LEVELS.index(level(name)))
    words = {
        "reasoning_kept": "answers reason {} as often as the baseline's",
        "reasoning_length_kept": "where they reason, answers do so at {} of the baseline's length",
    }
    evidence = " and ".join(
        words[name].format(percent(figures[name].value))
        + f" (interval {percent(figures[name].lo)}–{percent(figures[name].hi)})"
        for name in ("reasoning_kept", "reasoning_length_kept")
        if name in sure
    )
    kept = figures[worst]
    advice = _ADVICE["reasoning_lost"]
    return Finding(level(worst), "reasoning_lost", worst, kept.value, kept.lo, kept.hi, evidence, advice)


def _tax_without_benefit(probes: Sequence[Probe], config: DetectorConfig) -> Finding | None:
    """Diversity fell since the best held-out loss so far, and that loss has not fallen since.

    While held-out loss keeps falling, the best so far is the last probe; after that it stays where the benefit ended.
    """
    known = [(p.heldout_loss, p) for p in probes if p.heldout_loss is not None and math.isfinite(p.heldout_loss)]
    now = probes[-1]
    if len(known) < 2 or known[-1][1] is not now or now.measures is None:
        return None
    now_loss, earlier = known[-1][0], known[:-1]
    loss, best = min(reversed(earlier), key=lambda pair: pair[0])  # the latest of equals
    if best.measures is None or now_loss < loss * (1 - config.heldout_tolerance):
        return None
    is_open = now.measures.is_open
    kept = ratio(
        now.measures.per_prompt["semantic_distance"][is_open],
        best.measures.per_prompt["semantic_distance"][is_open],
        resampling=config.resampling,
    )
    if kept is None or kept.clusters < config.min_prompts or kept.p >= config.alpha:
        return None
    rose = now_loss > loss * (1 + config.heldout_tolerance)
    evidence = (
        f"since step {best.step} diversity fell to {percent(kept.value)} "
        f"(interval {percent(kept.lo)}–{percent(kept.hi)}) while "
        f"held-out loss {'rose' if rose else 'did not fall'} ({loss:.4f} → {now_loss:.4f} nats)"
    )
    advice = f"Stop earlier: the checkpoint at step {best.step} is as good on held-out data, and more varied."
    level = "warn" if rose else "info"
    metric = "diversity_retained_since_best_loss"
    return Finding(level, "tax_without_benefit", metric, kept.value, kept.lo, kept.hi, evidence, advice)


def _degeneration(now: Probe, config: DetectorConfig) -> Finding | None:
    reason = None if now.measures is None else unusable(now.measures, config=config)
    if reason is None:
        return None
    evidence = f"the model degenerates: {reason}; its figures of diversity mean little"
    return Finding("info", "degeneration", None, None, None, None, evidence, _ADVICE["degeneration"])


def _confirm(raw: Sequence[Sequence[Finding]], persistence: int) -> tuple[list[Finding], list[Finding]]:
    """The last probe's findings, each at the lowest level it had over `persistence` probes; and what is above that."""
    confirmed, pending = [], []
    window = [{finding.code: finding.level for finding in found} for found in raw[-persistence:]]
    for finding in raw[-1]:
        seen = [levels.get(finding.code, "ok") for levels in window]
        level = min(seen, key=LEVELS.index) if len(window) == persistence else "ok"
        if level != "ok":
            advice = _ADVICE[level] if finding.code == "narrowing" else finding.suggestion
            confirmed.append(dataclasses.replace(finding, level=level, suggestion=advice))
        if level != finding.level:
            pending.append(finding)
    return confirmed, pending


def _with_checkpoint(finding: Finding, healthy_step: int | None) -> Finding:
    """Names the checkpoint to go back to, where there is one."""
    if finding.code != "narrowing" or finding.level == "info" or healthy_step is None:
        return finding
    return dataclasses.replace(finding, suggestion=f"{finding.suggestion} Last healthy probe: step {healthy_step}.")


def _rank(finding: Finding) -> int:
    return LEVELS.index(finding.level)


def _top(findings: Sequence[Finding]) -> str:
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")
