"""Tier 2, within a prompt: how different K answers to the same prompt are, and whether they degenerate.

Invariant: what is undefined is `None`, never 0 and never an error: one answer has no pairs, an empty answer no
n-grams, a NaN embedding no angle. Only wrong shapes and options raise. An empty *text* is an answer like any other.

Only `pairwise_distance` may be compared between different K (its expectation does not depend on K); `vendi_score`,
`unique_rate`, `semantic_clusters` and `self_bleu` move with K, plain distinct-n with the length of the text. Meaning
collapses while n-gram figures stand still or rise (arXiv 2604.16027), so the alarm rests on the first; the others
explain.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.special import gammaln

__all__ = [
    "cosine_kernel",
    "distinct_n",
    "normalise_text",
    "pairwise_distance",
    "repeated_ngrams",
    "self_bleu",
    "semantic_clusters",
    "unique_rate",
    "unit_rows",
    "vendi_score",
]

Tokens = Sequence[Hashable]


def unit_rows(embeddings: np.ndarray) -> np.ndarray | None:
    """The rows scaled to length 1, float64 `[K, D]`; None where any row is NaN, infinite or zero and so has no
    direction.

    One bad row makes the prompt's figures undefined rather than being dropped: its absence would look like agreement.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"expected embeddings [K, D], got shape {rows.shape}")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / norms if np.isfinite(norms).all() and (norms > 0).all() else None


def cosine_kernel(embeddings: np.ndarray) -> np.ndarray | None:
    """Cosine similarities `[K, K]`, ones on the diagonal; None as `unit_rows`."""
    rows = unit_rows(embeddings)
    return None if rows is None else rows @ rows.T


def pairwise_distance(embeddings: np.ndarray) -> float | None:
    """1 − mean cosine over the K (K − 1) / 2 pairs i < j, in [0, 2]; None for K < 2 or a row without direction.

    A U-statistic: its expectation is that of two independent answers, for every K ≥ 2. (The mean over the whole K × K
    matrix is not: its diagonal pulls it down by a factor 1 − 1/K.)
    """
    rows = unit_rows(embeddings)
    if rows is None or len(rows) < 2:
        return None
    # Σ_{i≠j} u_i·u_j = ‖Σ u‖² − K
    k = len(rows)
    # Rounding may leave K times the same answer a hair below 0, which would print as -0%.
    return max(0.0, float(1 - (np.sum(rows.sum(axis=0) ** 2) - k) / (k * (k - 1))))


def vendi_score(kernel: np.ndarray | None) -> float | None:
    """Vendi score exp(−Σ λ log λ), λ the eigenvalues of kernel / K: 1 when all are the same, K when all are unrelated.

    Source: Friedman and Dieng, "The Vendi Score" (arXiv 2210.02410), order 1. Pitfall: grows with K.

    Args:
        kernel: `[K, K]` symmetric, positive semi-definite, ones on the diagonal; None gives None.
    """
    if kernel is None or len(kernel) == 0:
        return None
    kernel = np.asarray(kernel, dtype=np.float64)
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or not np.allclose(np.diag(kernel), 1):
        raise ValueError(f"expected a square kernel with ones on the diagonal, got shape {kernel.shape}")
    eigenvalues = np.linalg.eigvalsh(kernel / len(kernel))
    eigenvalues = eigenvalues[eigenvalues > 0]  # rounding leaves tiny negative ones; 0 log 0 = 0
    return float(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))


def semantic_clusters(embeddings: np.ndarray, *, similarity: float = 0.8) -> int | None:
    """Number of groups of answers that say the same: complete linkage, so *every* two members reach `similarity`.

    The threshold depends on the encoder; 0.8 separates paraphrases from different statements for small sentence
    encoders. None as `unit_rows`, and for no answers.
    """
    kernel = cosine_kernel(embeddings)
    if kernel is None or len(kernel) == 0:
        return None
    if len(kernel) == 1:
        return 1
    distance = np.clip(1 - kernel, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method="complete")
    # + 1e-9: pairs that sit exactly on the threshold belong together whatever the rounding
    return int(fcluster(tree, t=1 - similarity + 1e-9, criterion="distance").max())


def normalise_text(text: str) -> str:
    """Case folded, runs of white space as one space: the identity of an answer for duplicates and openings."""
    return " ".join(text.casefold().split())


def unique_rate(texts: Sequence[str]) -> float | None:
    """Distinct answers / answers, after `normalise_text`; None for no answers. Never under 1/K: compare at equal K."""
    return len({normalise_text(text) for text in texts}) / len(texts) if texts else None


def distinct_n(samples: Sequence[Tokens], n: int, *, tokens: int | None = None) -> float | None:
    """Distinct n-grams / n-grams over all samples (Li et al., arXiv 1510.03055); n-grams never cross samples.

    With `tokens=m`, rarefied: the expectation of the same figure over m of the N n-grams drawn without replacement,
    E[D_m] / m with E[D_m] = Σ_i [1 − C(N − N_i, m) / C(N, m)] (Hurlbert 1971). Longer text repeats more, so plain
    distinct-n falls when answers only grow; compare it at equal m. None for no n-grams, or for fewer than m.

    >>> distinct_n(["i am going".split(), "i am going".split(), "lets go i i".split()], 1)
    0.5
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    counts = Counter(gram for sample in samples for gram in zip(*(sample[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    if total == 0 or (tokens is not None and not 0 < tokens <= total):
        return None
    if tokens is None:
        return len(counts) / total
    left = total - np.fromiter(counts.values(), dtype=np.float64)  # N − N_i
    # log C(a, m) is −∞ where a < m (log-gamma is +∞ at 0, −1, …): such an n-gram is certain to be drawn
    log_absent = _log_binomial(left, tokens) - _log_binomial(np.array(float(total)), tokens)
    return float((len(left) - np.exp(log_absent).sum()) / tokens)


def self_bleu(texts: Sequence[str], *, tokenize: str = "13a") -> float | None:
    """Mean over the answers of sentence BLEU with all other answers as references, 0–100; high means alike.

    sacrebleu's BLEU (Zhu et al., arXiv 1802.01886 for the self-reference) with effective order: without it an answer
    under four tokens scores nearly 0 against its own copy. Pitfall: more references score higher, so compare at equal
    K.

    Args:
        texts: K answers; None for K < 2 or when all are empty.
        tokenize: a sacrebleu tokeniser; "char", "zh" or "ja-mecab" for scripts that do not use spaces.
    """
    if len(texts) < 2 or not any(text.strip() for text in texts):
        return None
    bleu = _bleu(tokenize)
    scores = [bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
    return float(np.mean(scores))


def repeated_ngrams(tokens: Tokens, *, n: int = 4) -> float | None:
    """1 − distinct n-grams / n-grams within one answer: 0 for fresh text, towards 1 for a loop; None under n tokens."""
    distinct = distinct_n([tokens], n)
    return None if distinct is None else 1 - distinct


def _log_binomial(n: np.ndarray, m: int) -> np.ndarray:
    return gammaln(n + 1) - gammaln(m + 1) - gammaln(n - m + 1)


@functools.cache
def _bleu(tokenize: str) -> Any:
    from sacrebleu.metrics import BLEU  # heavy, and only this figure needs it

    return BLEU(effective_order=True, tokenize=tokenize)
