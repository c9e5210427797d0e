"""What the detector is given and what it answers, as data.

Levels of a finding: `"ok"` (a statement, no alarm) < `"info"` < `"warn"` < `"critical"`. A verdict that could not look at
narrowing has none of them: its level is `"none"`, unless an alarm went off all the same (C14).

| code | level | says |
| --- | --- | --- |
| `narrowing` | info, warn, critical | answers to one prompt mean less different things than the baseline's |
| `homogeneity` | warn | different prompts get the same answer |
| `tax_without_benefit` | info, warn | diversity fell and held-out loss did not (info) or rose (warn) |
| `reasoning_lost` | info, warn, critical | fewer answers reason than the baseline's, or they reason at less length |
| `degeneration` | info | answers loop, never end or are empty |
| `no_baseline`, `baseline_unusable`, `no_probe` | ok | there is no verdict, and why |
| `no_embedder`, `ruler_range`, `one_sample`, `too_few_prompts` | ok | narrowing cannot be seen, and why |
| `nonfinite_logits` | ok | some logits are NaN or infinite |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_plugins.collapse.detect.bootstrap import Estimate, Resampling
from sft_plugins.collapse.metrics.per_prompt import Measures
from sft_plugins.errors import CollapseError

__all__ = ["BLIND", "LEVELS", "NO_LEVEL", "DetectorConfig", "Finding", "Probe", "Verdict", "percent", "rounded"]

LEVELS = ("ok", "info", "warn", "critical")
NO_LEVEL = "none"
"""The level of a verdict that could not look: above no other, below none, and never logged as a number."""
BLIND = frozenset(
    {
        "no_baseline",
        "baseline_unusable",
        "no_embedder",
        "ruler_range",
        "no_probe",
        "too_few_prompts",
        "one_sample",
    }
)
"""Codes of the statements after which "nothing was found" would be a claim about something that was not looked at."""


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Bands, limits and resampling.

    The bands come from one study with another encoder (arXiv 2604.16027: ordinary SFT kept 38–62 % of the base model's
    embedding diversity). They are parameters, and no verdict is better founded than they are.
    """

    info_below: float = 1.0
    """`info` when the whole interval of retained diversity is below this: something was lost."""
    warn_below: float = 0.62
    """`warn` below this: at least as much lost as ordinary SFT costs."""
    critical_below: float = 0.38
    """`critical` below this, if a second axis agrees: more lost than ordinary SFT costs."""
    fork_below: float = 0.62
    """Fork-entropy retention below this corroborates."""
    opening_rise: float = 0.1
    """The commonest opening's share up by more than this corroborates."""
    similarity_rise: float = 0.05
    """The cosine between answers to different prompts up by more than this corroborates."""
    reasoning_warn_below: float = 0.8
    """`reasoning_lost` is `warn` when the whole interval of the share that reasons, now ÷ before, is below this …"""
    reasoning_critical_below: float = 0.38
    """… and `critical` below this: most answers that reasoned do so no more."""
    reasoning_length_below: float = 0.5
    """`reasoning_lost` is `warn`, too, when what reasoning is left is shorter than this share of the baseline's."""
    heldout_tolerance: float = 0.005
    """Held-out loss has moved when it differs by more than this share of itself."""
    max_repetition: float = 0.3
    """A baseline is unusable above this mean share of repeated 4-grams within an answer …"""
    max_truncated: float = 0.95
    """… above this share of answers cut by the length limit …"""
    max_empty: float = 0.5
    """… or above this share of empty answers."""
    min_prompts: int = 4
    """With fewer usable open prompts there is no verdict on narrowing."""
    persistence: int = 2
    """Consecutive probes that a finding must hold for."""
    confidence: float = 0.95
    """Two-sided; a one-sided finding errs in (1 − confidence) / 2."""
    resamples: int = 2000
    """Bootstrap draws."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        bands = (self.critical_below, self.warn_below, self.info_below)
        _require(0 < bands[0] < bands[1] < bands[2], f"critical_below < warn_below < info_below must hold, got {bands}")
        _require(0.5 < self.confidence < 1, f"confidence must be in (0.5, 1), got {self.confidence}")
        for name, least in (("persistence", 1), ("min_prompts", 2), ("resamples", 200)):
            _require(getattr(self, name) >= least, f"{name} must be at least {least}, got {getattr(self, name)}")
        reasoning = (self.reasoning_critical_below, self.reasoning_warn_below)
        _require(
            0 < reasoning[0] < reasoning[1] <= 1,
            f"reasoning_critical_below < reasoning_warn_below must hold in (0, 1], got {reasoning}",
        )
        for name in ("fork_below", "reasoning_length_below", "opening_rise", "similarity_rise", "heldout_tolerance"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("max_repetition", "max_truncated", "max_empty"):
            _require(0 < getattr(self, name) <= 1, f"{name} must be in (0, 1], got {getattr(self, name)}")

    @property
    def resampling(self) -> Resampling:
        """The bootstrap's share of these options."""
        return Resampling(resamples=self.resamples, confidence=self.confidence, seed=self.seed)

    @property
    def alpha(self) -> float:
        """One-sided error of a finding."""
        return (1 - self.confidence) / 2


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one look at the model found. What was not measured is None."""

    step: int
    measures: Measures | None = None
    out_of_range: str | None = None
    """Why the ruler of meaning cannot read these answers; their semantic figures are then undefined (C11)."""
    fork_entropy: np.ndarray | None = None
    """`[E]` per held-out pair: Σ of the token entropies at the *baseline's* forks, nats (`entropy.grouped_sums`)."""
    fork_entropy_base: np.ndarray | None = None
    """`[E]`: the baseline's own sums over the very positions of `fork_entropy`; None where those are all its forks.

    They differ where logits are NaN now and were not before: sums over different positions would read as a fall.
    """
    heldout_loss: float | None = None
    """Token-weighted mean NLL on the held-out pairs, nats."""
    nonfinite: int = 0
    """Supervised positions whose logits were NaN or infinite."""


@dataclass(frozen=True)
class Finding:
    """One statement, with the figure that it rests on and what to do about it."""

    level: str
    code: str
    metric: str | None
    value: float | None
    lo: float | None
    hi: float | None
    evidence: str
    suggestion: str


@dataclass(frozen=True)
class Verdict:
    """What is known after the last probe."""

    step: int | None
    level: str
    """Highest level among `findings`; `"none"` where narrowing could not be looked at and nothing else alarmed."""
    findings: tuple[Finding, ...]
    """Confirmed by `persistence` consecutive probes, and plain statements; highest level first."""
    pending: tuple[Finding, ...]
    """Seen at the last probe, not confirmed at that level."""
    estimates: Mapping[str, Estimate]
    """The figures of the last probe, `comparison.estimate`."""
    healthy_step: int | None
    """The latest probe without a `warn` or `critical`, confirmed or pending: where one would roll back to."""

    @property
    def codes(self) -> frozenset[str]:
        """The codes of `findings`."""
        return frozenset(finding.code for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def rounded(value: float, form: str) -> str:
    """`format(value, form)`, without the sign of what is rounded to 0.

    A cosine that float32 takes to 1.0000001 makes a diversity of −0.0000001, which is 0 and no fall below it. (`format` does
    this by itself from Python 3.11 on, where `form` begins with "z".)

    Example:
        >>> rounded(-0.0004, ".2f"), rounded(-0.0004, "+.2f"), rounded(-0.04, ".2f")
        ('0.00', '+0.00', '-0.04')
    """
    text = format(value, form)
    return text if any(digit in text for digit in "123456789") else format(0.0, form)


def percent(share: float) -> str:
    """0.615 → "62%"."""
    return rounded(share, ".0%")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CollapseError(message, code="bad_option", remedy="correct these fields of DetectorConfig")
