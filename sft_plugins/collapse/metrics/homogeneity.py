"""Tier 2, across prompts: does the model begin to give every prompt the same safe answer?

Everything comes per prompt, since the prompt is the unit that the detector resamples. Undefined is NaN in an array (a
prompt without answers, an embedding without direction), never 0.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from sft_plugins.collapse.metrics.diversity import Tokens, normalise_text, unit_rows
from sft_plugins.collapse.metrics.refusals import BOILERPLATE, is_boilerplate

__all__ = [
    "boilerplate_rates",
    "commonest_opening",
    "cross_similarity",
    "duplicates_elsewhere",
    "most_informative_length",
    "opening_information",
    "opening_shares",
    "openings",
]

Opening = tuple[Hashable, ...]


def cross_similarity(embeddings: Sequence[np.ndarray]) -> np.ndarray:
    """Mean cosine between the answers to prompt p and those to prompt q, float64 `[P, P]`.

    Naively: `[[np.mean(unit(E_p) @ unit(E_q).T) for q] for p]`. The diagonal is NaN: answers to one prompt are not
    asked about here. NaN too for prompts without answers or with an embedding that has no direction. The mean off the
    diagonal is the across-prompt similarity; the matrix, not its row means, is what a bootstrap over prompts needs (a
    U-statistic of degree two varies about twice as much as its row means suggest).
    """
    units = [unit_rows(rows) if len(rows) else None for rows in embeddings]
    # the mean of all dot products between two sets is the dot product of their means
    width = next((rows.shape[1] for rows in units if rows is not None), 1)
    means = np.stack([np.full(width, np.nan) if rows is None else rows.mean(axis=0) for rows in units])
    matrix = means @ means.T
    np.fill_diagonal(matrix, np.nan)
    return matrix


def openings(answers: Sequence[Sequence[Tokens]], *, length: int = 4) -> list[list[Opening]]:
    """The first `length` tokens of every answer (all of a shorter one; `()` of an empty one)."""
    return [[tuple(answer[:length]) for answer in group] for group in answers]


def commonest_opening(found: Sequence[Sequence[Opening]]) -> Opening | None:
    """The opening with the largest mean share over prompts; ties go to the first seen. None without answers."""
    weight: dict[Opening, float] = defaultdict(float)
    for group in found:
        for opening in group:
            weight[opening] += 1 / len(group)
    return max(weight, key=weight.__getitem__) if weight else None


def opening_shares(found: Sequence[Sequence[Opening]], opening: Opening | None) -> np.ndarray:
    """Share of each prompt's answers that begin with `opening`, `[P]`; NaN for a prompt without answers.

    Its mean with `commonest_opening` is the share of the commonest opening. Pitfall: a model that answers each of P
    prompts in one way of its own has 1/P there, not 0.
    """
    return np.array([np.mean([item == opening for item in group]) if group else np.nan for group in found])


def opening_information(found: Sequence[Sequence[Opening]], *, permutations: int = 200, seed: int = 0) -> np.ndarray:
    """What a prompt's answers tell by their opening about which prompt they answer, in nats, `[P]`.

    Per prompt KL(P(opening | p) ‖ P(opening)); the mean, weighted by answers, is the mutual information of prompt and
    opening. Plug-in information is biased upwards, by everything when all openings differ, so the mean over seeded
    permutations of the openings among all answers is subtracted, per prompt. About 0 then means: nothing to be seen,
    either because all prompts get the same openings or because every opening is new; slightly negative is chance.

    Pitfall: the correction leaves some dependence on K, so compare at equal K.
    """
    sizes = np.array([len(group) for group in found], dtype=np.int64)
    prompt = np.repeat(np.arange(len(found)), sizes)
    index: dict[Opening, int] = {}
    code = np.array([index.setdefault(opening, len(index)) for group in found for opening in group], dtype=np.int64)
    rng = np.random.default_rng(seed)
    chance = np.zeros(len(found))
    for _ in range(permutations):
        chance += _plug_in_information(prompt, rng.permutation(code), len(found), len(index))
    information = _plug_in_information(prompt, code, len(found), len(index)) - chance / max(1, permutations)
    return np.where(sizes > 0, information, np.nan)


def most_informative_length(
    answers: Sequence[Sequence[Tokens]],
    *,
    lengths: Sequence[int] = (1, 2, 4, 8),
    permutations: int = 200,
    seed: int = 0,
) -> int:
    """The opening length at which the baseline's openings tell most about their prompt; ties go to the shorter.

    Where every opening of four tokens is new, information at that length is 0 before and after a collapse and can never
    fall. Chosen once, on the baseline, and kept.
    """
    information = [
        np.nanmean(opening_information(openings(answers, length=length), permutations=permutations, seed=seed))
        for length in lengths
    ]
    return lengths[int(np.argmax(information))]


def duplicates_elsewhere(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Share of each prompt's answers that some *other* prompt got word for word (`normalise_text`), `[P]`."""
    groups = [[normalise_text(text) for text in group] for group in texts]
    prompts_with = Counter(text for group in groups for text in set(group))
    return np.array([np.mean([prompts_with[text] > 1 for text in group]) if group else np.nan for group in groups])


def boilerplate_rates(texts: Sequence[Sequence[str]], *, patterns: Sequence[str] = BOILERPLATE) -> np.ndarray:
    """Share of each prompt's answers that match any of `patterns` or are empty, `[P]`.

    To extend the patterns: `(*BOILERPLATE, r"…")`.
    """
    compiled = [re.compile(pattern) for pattern in patterns]
    return np.array([np.mean([is_boilerplate(t, compiled) for t in group]) if group else np.nan for group in texts])


def _plug_in_information(prompt: np.ndarray, code: np.ndarray, prompts: int, codes: int) -> np.ndarray:
    """Σ_o P(o|p) log(P(o|p) / P(o)) per prompt, over the pairs (p, o) that occur."""
    if not len(code):
        return np.zeros(prompts)
    pairs, counts = np.unique(prompt * codes + code, return_counts=True)
    p, o = pairs // codes, pairs % codes
    conditional = counts / np.bincount(prompt, minlength=prompts)[p]
    marginal = (np.bincount(code, minlength=codes) / len(code))[o]
    return np.bincount(p, weights=conditional * np.log(conditional / marginal), minlength=prompts)
