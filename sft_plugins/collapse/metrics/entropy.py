"""Tier 1: how sure the model is of the next token, in nats, without generating anything.

Invariants: position t is judged by the label at t + 1, and only where that label is not −100 (C1). No token, no number:
`None`, never 0 (C6). Softmax runs over `chunk` tokens at a time, so no more than a few `[chunk, V]` float32 buffers
exist (C7). A position with NaN or infinite logits is counted in `nonfinite` and enters no mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from sft_plugins._constants import IGNORE_INDEX

__all__ = [
    "EntropyComparison",
    "EntropySummary",
    "Positions",
    "TokenStatistics",
    "compare",
    "concatenate",
    "fork_positions",
    "grouped_sums",
    "kl_from_cached",
    "summarize",
    "supervised_positions",
    "token_statistics_from_logits",
]

# One [chunk, V] float32 buffer of 2**24 elements is 64 MiB; softmax, entropy terms and a KL hold up to six at once.
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Positions:
    """Where a batch is supervised. `hidden[row, column]` predicts `target`; `offset` counts from the answer's start."""

    row: Tensor
    column: Tensor
    target: Tensor
    offset: Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Per supervised token, float32 on the CPU: entropy, NLL and KL(now ‖ base, or None) in nats, top-1 probability."""

    entropy: Tensor
    nll: Tensor
    top1: Tensor
    kl_now_base: Tensor | None = None

    @property
    def finite(self) -> Tensor:
        """bool `[N]`: positions whose every figure is a number."""
        present = [getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None]
        return torch.stack([torch.isfinite(values) for values in present]).all(dim=0)


@dataclass(frozen=True)
class EntropySummary:
    """Token-weighted means. Nats but for `top1` (a probability); None where no token counts."""

    tokens: int
    nonfinite: int
    entropy: float | None
    nll: float | None
    gap: float | None
    """NLL − entropy: about 0 when calibrated, above when the model is more certain than it is right."""
    top1: float | None
    kl_now_base: float | None
    entropy_by_position: tuple[float | None, ...] = ()
    """Mean entropy at the 1st, 2nd, … token of an answer."""
    entropy_rest: float | None = None
    """Mean entropy at all later tokens."""


@dataclass(frozen=True)
class EntropyComparison:
    """The same tokens under the model now and under its baseline. None where no token counts."""

    tokens: int
    fork_tokens: int
    entropy_ratio: float | None
    fork_retention: float | None


def supervised_positions(labels: Tensor) -> Positions:
    """Positions that a causal model is trained on, shifted.

    Naively: every (b, t) with `labels[b, t + 1] != -100`. `offset` is 0 at the first supervised token of an answer, and
    starts again after every unsupervised token (several turns, or several documents in a packed row).

    Args:
        labels: `[B, T]` integers, −100 where no loss is taken.
    """
    # labels   -100 -100  7  8 -100  9     keep    F T T F T     (label at t + 1)
    # column      0    1  2  3    4        column    1 2   4     offset  0 1 0
    keep = labels[:, 1:] != IGNORE_INDEX
    seen = keep.long().cumsum(dim=1)
    before_run = torch.where(keep, torch.zeros_like(seen), seen).cummax(dim=1).values
    row, column = keep.nonzero(as_tuple=True)
    return Positions(row, column, labels[:, 1:][keep], (seen - before_run - 1)[keep])


def token_statistics_from_logits(
    logits: Tensor, targets: Tensor, *, base_logits: Tensor | None = None, chunk: int | None = None
) -> TokenStatistics:
    """Entropy, NLL and top-1 probability of every token, and KL(now ‖ base) where `base_logits` is given.

    Naively, with `p = softmax(logits.float())`: `−(p * p.log()).sum(-1)`, `−p[target].log()`, `p.max(-1)` and
    `(p * (p / q).log()).sum(-1)`. A vocabulary entry masked by −inf has p = 0 and adds nothing.

    Args:
        logits: `[N, V]`, any float type; row i predicts `targets[i]`.
        targets: `[N]` token ids.
        base_logits: `[N, V]` of the baseline on the same tokens.
        chunk: tokens per softmax; by default as many as fill 64 MiB of float32.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"expected [N, V] logits with [N] targets, got {tuple(logits.shape)} and {tuple(targets.shape)}; "
            "pick the supervised positions with supervised_positions(labels) first"
        )
    if base_logits is not None and base_logits.shape != logits.shape:
        raise ValueError(f"base_logits has shape {tuple(base_logits.shape)}, logits {tuple(logits.shape)}")
    chunk = chunk or max(1, _CHUNK_ELEMENTS // max(1, logits.shape[-1]))
    entropy, nll, top1, kl = torch.empty(4, len(targets))
    with torch.no_grad():
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            now = _upcast(logits[part])
            # Not now.log_softmax(): that would be one more [chunk, V] buffer. The gathered logit is enough.
            chosen = now.gather(-1, targets[part].to(now.device)[:, None])[:, 0]
            nll[part] = (now.logsumexp(dim=-1) - chosen).cpu()
            if base_logits is None:
                p = now.softmax(dim=-1)
            else:
                p, kl[part] = _kl(now, _upcast(base_logits[part]))
            entropy[part] = torch.special.entr(p).sum(dim=-1).cpu()
            top1[part] = p.amax(dim=-1).cpu()
    return TokenStatistics(entropy, nll, top1, None if base_logits is None else kl)


def concatenate(parts: Sequence[TokenStatistics]) -> TokenStatistics:
    """The statistics of several batches as one, in order."""
    if not parts:
        return TokenStatistics(torch.empty(0), torch.empty(0), torch.empty(0))
    columns = [[getattr(part, f.name) for part in parts] for f in fields(TokenStatistics)]
    return TokenStatistics(*(None if any(v is None for v in column) else torch.cat(column) for column in columns))


def summarize(stats: TokenStatistics, *, offsets: Tensor | None = None, first: int = 8) -> EntropySummary:
    """Token-weighted means over the finite positions of any number of batches.

    Args:
        stats: per token.
        offsets: `[N]` position of each token in its answer (`Positions.offset`); without it no entropy by position.
        first: how many leading positions are given apart; the rest is one mean. The first tokens of an answer choose
            its course; further in, most tokens are forced by those before.
    """
    keep = stats.finite
    entropy, nll = _mean(stats.entropy[keep]), _mean(stats.nll[keep])
    by_position: tuple[float | None, ...] = ()
    rest = None
    if offsets is not None:
        offsets = offsets.cpu()
        by_position = tuple(_mean(stats.entropy[keep & (offsets == i)]) for i in range(first))
        rest = _mean(stats.entropy[keep & (offsets >= first)])
    return EntropySummary(
        tokens=int(keep.sum()),
        nonfinite=int((~keep).sum()),
        entropy=entropy,
        nll=nll,
        gap=None if entropy is None or nll is None else nll - entropy,
        top1=_mean(stats.top1[keep]),
        kl_now_base=None if stats.kl_now_base is None else _mean(stats.kl_now_base[keep]),
        entropy_by_position=by_position,
        entropy_rest=rest,
    )


def fork_positions(base_entropy: Tensor, *, share: float = 0.2) -> Tensor:
    """bool `[N]`: the ⌈share · n⌉ positions of highest finite baseline entropy; ties go to the earlier position.

    Most tokens are forced (the end of a word, a bracket); the mean entropy drowns in them. The few uncertain ones, the
    forks, decide where an answer goes ("Beyond the 80/20 rule", arXiv 2506.01939: the top fifth).
    Pitfall: positions chosen for a high value regress to the mean, so a retention a little under 1 is no finding.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    values = torch.where(torch.isfinite(base_entropy), base_entropy, torch.full_like(base_entropy, -torch.inf))
    count = int(np.ceil(share * int(torch.isfinite(base_entropy).sum())))
    forks = torch.zeros(len(values), dtype=torch.bool)
    forks[torch.argsort(values, descending=True, stable=True)[:count].cpu()] = True
    return forks


def compare(now: TokenStatistics, base: TokenStatistics, *, forks: Tensor | None = None) -> EntropyComparison:
    """Entropy ratio H_now / H_base, and the same over the forks: Σ_fork H_now / Σ_fork H_base (1 = nothing lost).

    Over the positions that are finite under both models. `forks` comes from `fork_positions(base.entropy)`, the
    default.
    """
    if len(now.entropy) != len(base.entropy):
        raise ValueError(f"now has {len(now.entropy)} tokens, base {len(base.entropy)}: not the same rows")
    both = now.finite & base.finite
    forks = both & (fork_positions(base.entropy) if forks is None else forks)
    return EntropyComparison(
        tokens=int(both.sum()),
        fork_tokens=int(forks.sum()),
        entropy_ratio=_ratio(now.entropy[both], base.entropy[both]),
        fork_retention=_ratio(now.entropy[forks], base.entropy[forks]),
    )


def grouped_sums(
    values: Tensor | np.ndarray, groups: Tensor | np.ndarray, count: int, *, where: Tensor | np.ndarray | None = None
) -> np.ndarray:
    """Sum of `values` per group: float64 `[count]`, NaN (no number) for a group without a finite value.

    For the detector's bootstrap over pairs: `grouped_sums(stats.entropy, row, len(pairs), where=forks)`.
    """
    values, groups = np.asarray(values, dtype=np.float64), np.asarray(groups)
    keep = np.isfinite(values) if where is None else np.isfinite(values) & np.asarray(where)
    sums = np.bincount(groups[keep], weights=values[keep], minlength=count)
    return np.where(np.bincount(groups[keep], minlength=count) > 0, sums, np.nan)


def kl_from_cached(base_logprobs: Tensor | np.ndarray, now_logprobs: Tensor | np.ndarray) -> float | None:
    """KL(base ‖ now) in nats per token, estimated on tokens that the baseline sampled: mean(log p_base − log p_now).

    Needs only the cached log-probabilities of the sampled tokens. Unbiased when those were sampled at temperature 1
    with no truncation, and then it may come out slightly negative. It grows where the model no longer supports what its
    base used to say. Pairs with a NaN or infinite member are left out; None when none is left.
    """
    base, now = np.asarray(base_logprobs, dtype=np.float64), np.asarray(now_logprobs, dtype=np.float64)
    if base.shape != now.shape:
        raise ValueError(f"base has {base.shape} log-probabilities, now {now.shape}: not the same samples")
    keep = np.isfinite(base) & np.isfinite(now)
    return float((base - now)[keep].mean()) if keep.any() else None


def _kl(logits: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits) and its KL from softmax(base) per row; in place where it may be."""
    now = logits.log_softmax(dim=-1)
    p = now.exp()
    now -= base.to(now.device).log_softmax(dim=-1)
    # 0 · log(0/q) = 0, also where an entry is masked by −inf in both and the difference is NaN; a NaN in p stays.
    terms = torch.where(p == 0, p, now.mul_(p))
    return p, terms.sum(dim=-1).cpu()


def _upcast(logits: Tensor) -> Tensor:
    """float32 at least: bf16 softmax over 150k entries is off in the second digit."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


def _ratio(numerator: Tensor, denominator: Tensor) -> float | None:
    total = float(denominator.double().sum())
    return float(numerator.double().sum()) / total if total > 0 else None
