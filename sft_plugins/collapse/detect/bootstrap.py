"""Intervals over prompts: the prompt is the unit that is resampled, never the answer.

Answers to one prompt resemble each other, so P × K answers are not P · K pieces of evidence; a figure that holds for
these prompts is asked to hold for other prompts like them. Each call draws P prompts with replacement, 2000 times, the
same draws for now and baseline (paired), and reads the interval from the draws' percentiles, widened for small P: the
plain percentile interval is too narrow by about a factor √((P − 1)/P) · z/t (Hesterberg, arXiv 1411.5279, §5.3,
"expanded percentiles"). Prompts that are NaN on either side are left out; below two prompts there is no interval, only
None.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

__all__ = ["FEW_PROMPTS", "Estimate", "Resampling", "holm", "mean_difference", "pair_mean_difference", "ratio"]


FEW_PROMPTS = 16
"""Open prompts below which intervals cover less than they say (`tests/benchmarks/bench_interval_coverage.py`)."""


@dataclass(frozen=True)
class Estimate:
    """A figure, its two-sided interval, and the one-sided p-value of its null hypothesis."""

    value: float
    lo: float
    hi: float
    p: float
    clusters: int
    """Prompts (or held-out pairs) that it rests on."""


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals are drawn: `resamples` draws by `seed`, two-sided `confidence`."""

    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0


DEFAULT = Resampling()


def ratio(now: np.ndarray, base: np.ndarray, *, null: float = 1.0, resampling: Resampling = DEFAULT) -> Estimate | None:
    """Σ now / Σ base over the prompts defined on both sides; p is for "it is `null` or more".

    The ratio of means, not the mean of ratios: one prompt with a baseline near 0 would rule the latter. None for fewer
    than two prompts or a baseline that sums to 0.
    """
    now, base = _paired(now, base)
    if len(now) < 2 or base.sum() <= 0:
        return None
    counts = _counts(len(now), resampling.resamples, resampling.seed)
    totals = counts @ base
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = (counts @ now) / totals
    return _estimate(now.sum() / base.sum(), draws[totals > 0], len(now), null=null, below=True, resampling=resampling)


def mean_difference(
    now: np.ndarray,
    base: np.ndarray,
    *,
    null: float = 0.0,
    below: bool,
    resampling: Resampling = DEFAULT,
) -> Estimate | None:
    """mean(now − base) over the prompts defined on both sides.

    p is for "it is `null` or more" with `below`, for "`null` or less" otherwise. None for fewer than two prompts.
    """
    now, base = _paired(now, base)
    if len(now) < 2:
        return None
    change = now - base
    draws = _counts(len(now), resampling.resamples, resampling.seed) @ change / len(now)
    return _estimate(change.mean(), draws, len(now), null=null, below=below, resampling=resampling)


def pair_mean_difference(
    now: np.ndarray, base: np.ndarray, *, null: float = 0.0, resampling: Resampling = DEFAULT
) -> Estimate | None:
    """Mean of `now − base` over pairs of different prompts, prompts resampled; p is for "it is `null` or less".

    Args:
        now: `[P, P]`, symmetric; a prompt that is undefined has its whole row and column NaN. The diagonal is not read.
        base: as `now`.
    """
    change = np.array(now, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    np.fill_diagonal(change, 0.0)
    defined = np.isfinite(change).sum(axis=1) > 1  # more than the diagonal
    change = change[np.ix_(defined, defined)]
    n = len(change)
    if n < 2 or not np.isfinite(change).all():
        return None
    counts = _counts(n, resampling.resamples, resampling.seed)
    # a prompt drawn twice is no pair of different prompts: Σ_{p≠q} c_p c_q = (Σ c)² − Σ c²
    pairs = n**2 - (counts**2).sum(axis=1)
    draws = np.einsum("bp,pq,bq->b", counts, change, counts, optimize=True)[pairs > 0] / pairs[pairs > 0]
    return _estimate(change.sum() / (n * (n - 1)), draws, n, null=null, below=False, resampling=resampling)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values: rejecting those under α keeps the family's error under α.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted, running = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = running
    return adjusted


def _paired(now: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    now, base = np.asarray(now, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if now.shape != base.shape:
        raise ValueError(f"now has shape {now.shape}, base {base.shape}: not the same prompts")
    keep = np.isfinite(now) & np.isfinite(base)
    return now[keep], base[keep]


@functools.lru_cache(maxsize=8)
def _counts(clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn, float64 `[B, P]`; rows sum to P."""
    return np.random.default_rng(seed).multinomial(clusters, [1 / clusters] * clusters, size=resamples).astype(float)


def _estimate(value: float, draws: np.ndarray, n: int, *, null: float, below: bool, resampling: Resampling) -> Estimate:
    widen = math.sqrt(n / (n - 1))
    tail = float(norm.cdf(widen * t.ppf((1 - resampling.confidence) / 2, n - 1)))
    lo, hi = np.quantile(draws, [tail, 1 - tail])
    against = int(np.sum(draws >= null if below else draws <= null))
    if against >= 10:
        z = float(norm.ppf(against / len(draws)))
    else:
        # B draws cannot resolve this tail: take it as normal. No spread at all (every prompt alike) is certainty.
        distance = (float(draws.mean()) - null) * (1 if below else -1)
        spread = float(draws.std())
        z = distance / spread if spread > 0 else math.copysign(math.inf, distance)
    return Estimate(float(value), float(lo), float(hi), float(t.cdf(z / widen, n - 1)), n)
