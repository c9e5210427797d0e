"""One probe's tier 2 as arrays over prompts: what is written to the history, compared and resampled.

Invariant: a baseline and a probe measured with the same options are comparable, whatever their numbers of answers:
figures that move with K are taken from the first `equal_k` answers, distinct-n is rarefied, the others do not depend
on K.

| per prompt | meaning | K |
| --- | --- | --- |
| `semantic_distance` | 1 − mean pairwise cosine; what the alarm rests on | all |
| `vendi`, `clusters` | effective number of answers; groups that say the same | equal |
| `unique`, `self_bleu` | distinct answers / answers; BLEU against the others, 0–100 | equal |
| `distinct_1`, `distinct_2` | distinct n-grams at `rarefy_to` n-grams | rarefied |
| `opening_share`, `opening_information` | across `open` prompts; NaN for `closed` ones | equal |
| `duplicates` | share of answers that another `open` prompt got too; NaN for `closed` ones | equal |
| `boilerplate`, `empty`, `truncated` | share of answers | all |
| `repetition` | mean share of repeated 4-grams within an answer | all |
| `length` | mean tokens per answer | all |
| `reasoning` | share of answers that reason | all |
| `reasoning_length` | mean tokens of reasoning in the answers that reason; NaN where none does | all |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_plugins.collapse.metrics import diversity, homogeneity
from sft_plugins.collapse.metrics.diversity import Tokens
from sft_plugins.collapse.metrics.refusals import BOILERPLATE

__all__ = ["Measures", "measure"]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Tier 2 of one probe. Arrays are float64 over the same prompts in the same order at every probe of a run."""

    tags: tuple[str, ...]
    """`"open"` or `"closed"` per prompt."""
    samples: int
    """Most answers that a prompt has."""
    per_prompt: Mapping[str, np.ndarray]
    """Name → `[P]`, NaN where undefined. The semantic names are all NaN without embeddings."""
    cross_similarity: np.ndarray | None
    """`[P, P]` mean cosine between answers to different prompts, diagonal NaN; None without embeddings."""
    opening: tuple[Any, ...] | None
    """The commonest opening across the `open` prompts, as tokens."""

    @property
    def is_open(self) -> np.ndarray:
        """bool `[P]`."""
        return np.array([tag == "open" for tag in self.tags])

    def mean(self, name: str, *, only_open: bool = False) -> float | None:
        """Mean over the prompts that have this figure; None when none has."""
        values = self.per_prompt[name][self.is_open] if only_open else self.per_prompt[name]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, NaN as null."""
        return {
            "tags": list(self.tags),
            "samples": self.samples,
            "per_prompt": {name: _to_json(values) for name, values in self.per_prompt.items()},
            "cross_similarity": None if self.cross_similarity is None else _to_json(self.cross_similarity),
            "opening": None if self.opening is None else list(self.opening),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measures:
        """The inverse of `to_json`."""
        cross = data["cross_similarity"]
        return cls(
            tags=tuple(data["tags"]),
            samples=data["samples"],
            # float64 turns null into NaN
            per_prompt={name: np.array(values, dtype=np.float64) for name, values in data["per_prompt"].items()},
            cross_similarity=None if cross is None else np.array(cross, dtype=np.float64),
            opening=None if data["opening"] is None else tuple(data["opening"]),
        )


def measure(
    texts: Sequence[Sequence[str]],
    tokens: Sequence[Sequence[Tokens]],
    *,
    tags: Sequence[str],
    embeddings: Sequence[np.ndarray] | None = None,
    truncated: Sequence[Sequence[bool]] | None = None,
    reasoning: Sequence[Sequence[int]] | None = None,
    equal_k: int | None = None,
    opening_length: int = 4,
    information_length: int | None = None,
    rarefy_to: int = 100,
    cluster_similarity: float = 0.8,
    patterns: Sequence[str] = BOILERPLATE,
    bleu_tokenize: str = "13a",
    permutations: int = 200,
    seed: int = 0,
) -> Measures:
    """Every figure of the module's table.

    Args:
        texts: the answers to each prompt, decoded without special tokens.
        tokens: the same as token ids (without the stop token); n-grams, lengths and openings are counted in these.
        tags: `"open"` or `"closed"` per prompt.
        embeddings: `[K, D]` per prompt; None when there is no encoder.
        truncated: whether each answer ran into the length limit; NaN figures without it.
        reasoning: tokens of reasoning in each answer, 0 for one that does not reason; NaN figures without it.
        equal_k: how many answers the figures that move with K are taken from, counted from the first. Give a baseline
        with
            more answers than the probes the probes' K.
        opening_length: tokens of the opening whose share is taken.
        information_length: tokens of the opening whose information is taken, by default `opening_length`. Take it from
        the
            baseline with `homogeneity.most_informative_length` and keep it.
        rarefy_to: n-grams that distinct-n is rarefied to; a prompt with fewer has none.
        cluster_similarity: cosine from which two answers say the same.
        patterns: regular expressions of refusals and boilerplate.
        bleu_tokenize: sacrebleu's tokeniser for self-BLEU.
        permutations: for the bias of the information.
        seed: of the permutations.
    """
    prompts = len(texts)
    for name, column in (
        ("tokens", tokens),
        ("tags", tags),
        ("embeddings", embeddings),
        ("truncated", truncated),
        ("reasoning", reasoning),
    ):
        if column is not None and len(column) != prompts:
            raise ValueError(f"{name} has {len(column)} entries for {prompts} prompts")
    if unknown := sorted(set(tags) - {"open", "closed"}):
        raise ValueError(f"unknown prompt tags {unknown}; allowed: 'open', 'closed'")

    first_texts = [list(group[:equal_k]) for group in texts]
    first_tokens = [list(group[:equal_k]) for group in tokens]
    figures: dict[str, np.ndarray] = {
        "unique": _array(diversity.unique_rate(group) for group in first_texts),
        "self_bleu": _array(diversity.self_bleu(group, tokenize=bleu_tokenize) for group in first_texts),
        "distinct_1": _array(diversity.distinct_n(group, 1, tokens=rarefy_to) for group in tokens),
        "distinct_2": _array(diversity.distinct_n(group, 2, tokens=rarefy_to) for group in tokens),
        "boilerplate": homogeneity.boilerplate_rates(texts, patterns=patterns),
        "empty": _array(_mean(not text.strip() for text in group) for group in texts),
        "truncated": _array([None] * prompts if truncated is None else (_mean(group) for group in truncated)),
        "repetition": _array(_mean(diversity.repeated_ngrams(answer) for answer in group) for group in tokens),
        "length": _array(_mean(len(answer) for answer in group) for group in tokens),
        "reasoning": _array(
            [None] * prompts if reasoning is None else (_mean(n > 0 for n in group) for group in reasoning)
        ),
        "reasoning_length": _array(
            [None] * prompts if reasoning is None else (_mean(n for n in group if n > 0) for group in reasoning)
        ),
    }

    # "The same answer to everything" is asked of the open prompts: closed ones may well share "Yes." and "4".
    is_open = np.array([tag == "open" for tag in tags], dtype=bool)
    open_texts = [group for group, keep in zip(first_texts, is_open, strict=True) if keep]
    open_tokens = [group for group, keep in zip(first_tokens, is_open, strict=True) if keep]
    found = homogeneity.openings(open_tokens, length=opening_length)
    opening = homogeneity.commonest_opening(found)
    informative = homogeneity.openings(open_tokens, length=information_length or opening_length)
    information = homogeneity.opening_information(informative, permutations=permutations, seed=seed)
    figures["opening_share"] = _spread(homogeneity.opening_shares(found, opening), is_open)
    figures["opening_information"] = _spread(information, is_open)
    figures["duplicates"] = _spread(homogeneity.duplicates_elsewhere(open_texts), is_open)

    groups: list[np.ndarray | None] = [None] * prompts if embeddings is None else list(embeddings)
    first = [None if rows is None else rows[:equal_k] for rows in groups]
    figures["semantic_distance"] = _array(
        None if rows is None else diversity.pairwise_distance(rows) for rows in groups
    )
    figures["vendi"] = _array(
        None if rows is None else diversity.vendi_score(diversity.cosine_kernel(rows)) for rows in first
    )
    figures["clusters"] = _array(
        None if rows is None else diversity.semantic_clusters(rows, similarity=cluster_similarity) for rows in first
    )
    return Measures(
        tags=tuple(tags),
        samples=max((len(group) for group in texts), default=0),
        per_prompt=figures,
        cross_similarity=None if embeddings is None else homogeneity.cross_similarity(embeddings),
        opening=opening,
    )


def _array(values: Any) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _mean(values: Any) -> float | None:
    present = [float(value) for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _spread(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """`values` at the prompts of `where`, NaN elsewhere."""
    full = np.full(len(where), np.nan)
    full[where] = values
    return full


def _to_json(values: np.ndarray) -> Any:
    """Nested lists, NaN as None: JSON has no NaN, and a reader must not take one for a number."""
    numbers = values.astype(object)
    numbers[~np.isfinite(values)] = None
    return numbers.tolist()
