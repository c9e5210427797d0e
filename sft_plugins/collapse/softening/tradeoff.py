"""What a run keeps and what it costs at each share λ of its training, and which λ to take.

Every figure is the watch's own: its prompts, its held-out pairs, its baseline, its ruler, its intervals.

    λ = 1     loss 1.21 (1.10–1.33)   variety kept 41 %   warn           as trained
    λ = 3/4   loss 1.24               variety kept 66 %   info           ← the largest that is healthy at no more loss
    λ = 1/2   loss 1.52               variety kept 89 %   ok             above 1.33: training is given up
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import nn

from sft_plugins._preserve import untouched
from sft_plugins._report import plain
from sft_plugins.collapse.detect.bootstrap import Estimate, mean_difference, ratio
from sft_plugins.collapse.detect.detector import detect
from sft_plugins.collapse.detect.verdict import NO_LEVEL, DetectorConfig, Verdict
from sft_plugins.collapse.metrics.entropy import grouped_sums
from sft_plugins.collapse.probe.figures import to_probe
from sft_plugins.collapse.probe.probe import Look, Prober
from sft_plugins.errors import CollapseError

__all__ = ["SHARES", "Dial", "Place", "Tradeoff", "checked_shares", "measure_tradeoff"]

SHARES = (1.0, 0.75, 0.5, 0.25)
_SHOWN_PROMPTS, _SHOWN_ANSWERS = 4, 2
Outcome = Literal["recommended", "as_trained", "none", "blind"]


class Dial(Protocol):
    """A model between its base (0) and what training made of it (1)."""

    model: Any

    def turn(self, share: float) -> None:
        """Set the model to `share`."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What was measured at one λ. Intervals are None where the figure cannot be had."""

    share: float
    loss: Estimate | None
    """Held-out loss in nats per token."""
    loss_change: Estimate | None
    """Mean over held-out pairs of (their loss here − at λ = 1), paired."""
    diversity: Estimate | None
    reasoning: Estimate | None
    forks: Estimate | None
    level: str
    codes: tuple[str, ...]
    evidence: tuple[str, ...]
    healthy: bool
    """No alarm, and variety and reasoning themselves inside the band."""
    within: bool
    """Held-out loss no higher than the upper end of the interval at λ = 1."""


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """Every λ that was looked at, largest first, and what follows."""

    places: tuple[Place, ...]
    outcome: Outcome
    recommended: float | None
    reason: str
    samples: tuple[dict[str, Any], ...]
    """Of the first open prompts: its text, and per λ some answers."""
    bands: DetectorConfig

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dict(plain(dataclasses.asdict(self)))


def checked_shares(at: Sequence[float] | None) -> tuple[float, ...]:
    """`at` without doubles, largest first, and 1 among them: what the others are held against.

    Raises:
        CollapseError: `bad_share`.
    """
    shares = SHARES if at is None else tuple(at)
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise CollapseError(
                f"λ is {share!r}; expected numbers from 0 (the base) to 1 (as trained)",
                code="bad_share",
                remedy="give some between, like 0.75,0.5; beyond 1 lies what no training has seen",
            )
    return tuple(sorted({1.0, *map(float, shares)}, reverse=True))


def measure_tradeoff(
    dial: Dial,
    prober: Prober,
    base: Look,
    shares: Sequence[float],
    *,
    config: DetectorConfig,
    advance: Callable[[float], None] = lambda _: None,
) -> Tradeoff:
    """Look at the model at each λ with the watch's probe.

    Args:
        base: the baseline as `Prober.use_baseline` gave it.
        shares: of `checked_shares`.
        advance: called with each λ before it is looked at.
    """
    once = dataclasses.replace(config, persistence=1)  # every λ is asked once; there is no probe before it to confirm
    places: list[Place] = []
    samples: dict[int, dict[str, Any]] = {
        p.id: {"prompt": p.text, "answers": []} for p in [p for p in prober.prompts if p.tag == "open"][:_SHOWN_PROMPTS]
    }
    reference: _Losses | None = None
    for share in shares:
        advance(share)
        dial.turn(share)
        model: nn.Module = dial.model
        with untouched(model, prober.tokenizer):
            look = prober.look(model, 2)
        losses = _Losses.of(look)
        reference = reference or losses
        places.append(_place(share, look, losses, reference, base, places, config=once))
        for prompt, group in zip(prober.prompts, prober.by_prompt(look.samples), strict=True):
            if prompt.id in samples:
                told = [sample.text for sample in group[:_SHOWN_ANSWERS]]
                samples[prompt.id]["answers"].append({"share": share, "texts": told})
    outcome, recommended, reason = _recommend(places)
    return Tradeoff(
        places=tuple(places),
        outcome=outcome,
        recommended=recommended,
        reason=reason,
        samples=tuple(samples.values()),
        bands=config,
    )


@dataclass(frozen=True)
class _Losses:
    """Summed losses and tokens of each held-out pair."""

    sums: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def of(look: Look) -> _Losses | None:
        if look.held_out is None or not len(look.held_out.row):
            return None
        judged = look.held_out
        count, finite = int(judged.row.max()) + 1, judged.stats.finite
        sums = grouped_sums(judged.stats.nll, judged.row, count, where=finite)
        tokens = grouped_sums(np.ones(len(judged.row)), judged.row, count, where=finite)
        return _Losses(sums, tokens)


def _place(
    share: float,
    look: Look,
    losses: _Losses | None,
    reference: _Losses | None,
    base: Look,
    earlier: Sequence[Place],
    *,
    config: DetectorConfig,
) -> Place:
    verdict = detect(to_probe(base, base, step=0), [to_probe(look, base, step=1)], config=config)
    found = verdict.estimates
    loss = change = None
    if losses is not None and reference is not None:
        loss = ratio(losses.sums, losses.tokens, resampling=config.resampling)
        means = losses.sums / losses.tokens, reference.sums / reference.tokens
        change = mean_difference(*means, below=False, resampling=config.resampling)
    limit = earlier[0].loss if earlier else loss
    return Place(
        share=share,
        loss=loss,
        loss_change=change,
        diversity=found.get("diversity_retained"),
        reasoning=found.get("reasoning_kept"),
        forks=found.get("fork_retention"),
        level=verdict.level,
        codes=tuple(finding.code for finding in verdict.findings),
        evidence=tuple(finding.evidence for finding in verdict.findings),
        healthy=_healthy(verdict, config),
        within=loss is not None and limit is not None and loss.value <= limit.hi,
    )


def _healthy(verdict: Verdict, config: DetectorConfig) -> bool:
    """No alarm goes off; and since that needs a whole interval, the figures themselves are inside the band, too."""
    bands = {"diversity_retained": config.warn_below, "reasoning_kept": config.reasoning_warn_below}
    kept = [verdict.estimates[name].value >= band for name, band in bands.items() if name in verdict.estimates]
    return verdict.level in ("ok", "info") and all(kept)


def _recommend(places: Sequence[Place]) -> tuple[Outcome, float | None, str]:
    if all(place.level == NO_LEVEL for place in places):
        return "blind", None, f"narrowing could not be looked at: {'; '.join(places[0].evidence)}"
    if places[0].loss is None:
        return "blind", None, "there are no held-out pairs to tell what a smaller λ costs; watch the next run with some"
    for place in places:
        if place.healthy and place.within:
            if place.share == 1:
                return "as_trained", 1.0, "the model is healthy as it was trained; there is nothing to soften"
            return "recommended", place.share, "the largest λ that is healthy at a held-out loss within that of λ = 1"
    healthy = [place.share for place in places if place.healthy]
    if not healthy:
        return "none", None, "no λ that was tried is healthy; try smaller ones with --at, or train again on other data"
    return (
        "none",
        None,
        f"λ = {max(healthy):g} is healthy, but its held-out loss is above the interval of λ = 1: softening would give "
        "training up rather than mend it",
    )
