"""Probes of a model whose diversity is set by hand."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sft_plugins.collapse.detect.verdict import Finding, Probe, Verdict
from sft_plugins.collapse.metrics.per_prompt import Measures, measure
from testkit.answer_worlds import World

PROMPTS, K = 16, 8


FORKS = np.random.default_rng(7).uniform(5, 15, 24)


def probe(step: int, measures: Measures | None, *, forks: float | None = 1.0, loss: float | None = None) -> Probe:
    return Probe(step=step, measures=measures, fork_entropy=None if forks is None else FORKS * forks, heldout_loss=loss)


def changed(measures: Measures, **per_prompt: np.ndarray | float) -> Measures:
    """`measures` with whole figures replaced."""
    figures = {name: np.broadcast_to(value, len(measures.tags)).astype(float) for name, value in per_prompt.items()}
    return dataclasses.replace(measures, per_prompt={**measures.per_prompt, **figures})


def scaled(measures: Measures, share: float) -> Measures:
    """`measures` with `share` of its diversity."""
    return changed(measures, semantic_distance=measures.per_prompt["semantic_distance"] * share)


def finding(verdict: Verdict, code: str) -> Finding:
    (found,) = [item for item in verdict.findings if item.code == code]
    return found


WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heron",
    "islet",
    "jetty",
    "knoll",
    "larch",
    "maple",
    "north",
    "ocean",
    "plume",
]


def answers(
    texts: Sequence[Sequence[str]], vectors: Sequence[np.ndarray], tags: Sequence[str] = ("open",) * PROMPTS
) -> Measures:
    tokens = [[text.split() for text in group] for group in texts]
    return measure(texts, tokens, tags=tags, embeddings=vectors, equal_k=K, information_length=1, rarefy_to=20)


def varied_answers(rng: np.random.Generator, k: int) -> list[list[str]]:
    """Every prompt begins with a word of its own most of the time, then goes on at random."""
    return [
        [" ".join([WORDS[p] if rng.random() < 0.7 else "well", *rng.choice(WORDS, size=7)]) for _ in range(k)]
        for p in range(PROMPTS)
    ]


def varied_vectors(world: World, rng: np.random.Generator, k: int) -> list[np.ndarray]:
    return [rows[rng.integers(0, len(rows), size=k)] for rows in world.vectors]
