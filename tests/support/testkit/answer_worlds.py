"""Models whose variety is known exactly: each prompt has a finite pool of possible answers with probabilities.

The true diversity of a prompt is then a finite sum, Σ_ij w_i w_j (1 − cos_ij), and a true fall is set, not estimated.
Answers come in modes, a few likely ones per prompt, so eight samples see as little as they see of a real model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from sft_plugins.collapse.metrics import diversity
from sft_plugins.collapse.metrics import homogeneity as openings
from sft_plugins.collapse.metrics.per_prompt import Measures

_OPENINGS = 12


@dataclass(frozen=True)
class World:
    """A model as the detector sees it: P prompts with M possible answers each."""

    vectors: np.ndarray
    """`[P, M, D]` unit embeddings."""
    weights: np.ndarray
    """`[P, M]` probabilities."""
    opening: np.ndarray
    """`[P, M]` id of the opening of each answer."""
    tags: tuple[str, ...]

    @property
    def distance(self) -> np.ndarray:
        """True 1 − E[cosine of two independent answers], `[P]`."""
        means = np.einsum("pm,pmd->pd", self.weights, self.vectors)
        return 1 - (means**2).sum(axis=1)

    def narrowed(self, retained: np.ndarray | float) -> World:
        """The same answers with sharper odds, so that each prompt keeps `retained` ≤ 1 of its true distance."""
        log_odds = np.log(self.weights)

        def sharpened(gamma: np.ndarray) -> World:
            odds = np.exp(gamma[:, None] * (log_odds - log_odds.max(axis=1, keepdims=True)))
            return replace(self, weights=odds / odds.sum(axis=1, keepdims=True))

        return self._reaching(retained, sharpened, from_=3000.0, to=1.0)

    def spread(self, factor: np.ndarray | float) -> World:
        """The same odds, answers drawn towards or away from their mean: each prompt's true distance times `factor`."""
        centre = np.einsum("pm,pmd->pd", self.weights, self.vectors)[:, None]

        def moved(scale: np.ndarray) -> World:
            vectors = centre + scale[:, None, None] * (self.vectors - centre)
            return replace(self, vectors=vectors / np.linalg.norm(vectors, axis=2, keepdims=True))

        return self._reaching(factor, moved, from_=0.0, to=3.0)

    def _reaching(
        self, share: np.ndarray | float, change: Callable[[np.ndarray], World], *, from_: float, to: float
    ) -> World:
        """`change(x)` with the x, per prompt, at which distance is `share` of what it is; it grows from `from_` to `to`."""
        target = np.broadcast_to(share, len(self.weights)) * self.distance
        low, high = np.full(len(target), from_), np.full(len(target), to)
        for _ in range(60):
            middle = (low + high) / 2
            short = change(middle).distance < target
            low, high = np.where(short, middle, low), np.where(short, high, middle)
        return change(high)

    def measured(self, k: int, rng: np.random.Generator, *, equal_k: int | None = None) -> Measures:
        """What a probe with `k` samples per prompt sees; only the figures that the detector reads."""
        cumulative = self.weights.cumsum(axis=1)
        draws = (rng.random((len(self.weights), k, 1)) > cumulative[:, None, :]).sum(axis=2)
        draws = np.minimum(draws, self.weights.shape[1] - 1)
        rows = np.arange(len(draws))
        embeddings = [self.vectors[p, draws[p]] for p in rows]
        is_open = np.array([tag == "open" for tag in self.tags])
        found = [[(int(o),) for o in self.opening[p, draws[p, :equal_k]]] for p in rows[is_open]]
        common = openings.commonest_opening(found)
        share, information = np.full((2, len(rows)), np.nan)
        share[is_open] = openings.opening_shares(found, common)
        information[is_open] = openings.opening_information(found, permutations=20)
        distance = [diversity.pairwise_distance(vectors) for vectors in embeddings]
        return Measures(
            tags=self.tags,
            samples=k,
            per_prompt={
                "semantic_distance": np.array(distance, dtype=float),
                "opening_share": share,
                "opening_information": information,
                "repetition": np.zeros(len(rows)),
                "truncated": np.zeros(len(rows)),
                "empty": np.zeros(len(rows)),
            },
            cross_similarity=openings.cross_similarity(embeddings),
            opening=common,
        )


def make_world(
    prompts: int, rng: np.random.Generator, *, answers: int = 40, width: int = 64, tags: tuple[str, ...] | None = None
) -> World:
    """A healthy model: distance about 0.1 to 0.6 within a prompt (it differs by prompt), about 0.9 across prompts."""
    shared = rng.normal(size=width)
    topic = rng.normal(size=(prompts, 1, width))
    mode = rng.normal(size=(prompts, answers, width))
    loose = rng.uniform(0.4, 1.2, size=(prompts, 1, 1))  # how far the answers to this prompt spread
    vectors = 0.35 * shared + topic + loose * mode
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    likely = np.exp(rng.normal(-1.0, 0.5, size=prompts))  # Dirichlet α: a few likely answers and a long tail
    weights = np.stack([rng.dirichlet(np.full(answers, alpha)) for alpha in likely]) + 1e-4
    weights /= weights.sum(axis=1, keepdims=True)
    liked = rng.integers(0, _OPENINGS, size=(prompts, 3))  # every prompt has openings that suit it
    opening = np.take_along_axis(liked, rng.integers(0, 3, size=(prompts, answers)), axis=1)
    return World(vectors, weights, opening, tags or ("open",) * prompts)


def fork_entropy(pairs: int, retained: float, base: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Σ fork entropy per held-out pair after training: `retained` of the baseline's on average, scattered by pair."""
    return base * retained * np.exp(rng.normal(-0.02, 0.2, size=pairs))
