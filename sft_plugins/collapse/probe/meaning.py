"""The ruler of meaning at work in one run: which it is, whether it reads the baseline, and whether it reads the answers now.

Invariant: one ruler for a whole run, settled when the baseline is; a fallback may take its place there, never later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sft_plugins.collapse.distributed import Ranks
from sft_plugins.collapse.probe.baseline import Baseline
from sft_plugins.collapse.probe.embedder import Embedder
from sft_plugins.collapse.probe.prompts import load_prompts
from sft_plugins.collapse.probe.ruler import Reading, out_of_range, read_texts

__all__ = ["Meaning"]

_BATCH = 64


class Meaning:
    """`embedder` is the ruler, `fallback` what serves where it cannot read the baseline; both may be None.

    After `settle`, `reading` is how the ruler reads the baseline and `out_of_range` why it cannot.
    """

    def __init__(self, ranks: Ranks, *, seed: int) -> None:
        self.ranks, self.seed = ranks, seed
        self.embedder: Embedder | None = None
        self.fallback: Embedder | None = None
        self.reading: Reading | None = None
        self.out_of_range: str | None = None
        self._english: float | None = None
        self._baseline: np.ndarray | None = None

    @property
    def label(self) -> str | None:
        """What to call the ruler."""
        return None if self.embedder is None else self.embedder.label

    def embed(self, texts: Sequence[str]) -> np.ndarray | None:
        """`[N, D]`, the work divided among ranks; None without a ruler."""
        if self.embedder is None:
            return None
        batches = [texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH)]
        return np.concatenate(self.ranks.deal(batches, self.embedder.encode))

    def centre(self, embeddings: np.ndarray | None) -> np.ndarray | None:
        """What is taken off every vector before a cosine, where the ruler asks for it."""
        asks = self.embedder is not None and self.embedder.centre
        return embeddings.mean(axis=0) if asks and embeddings is not None else None

    def settle(self, baseline: Baseline) -> Baseline:
        """`baseline` with the vectors of the ruler that reads it; the fallback's, where the first one cannot."""
        baseline = self._with_ruler(baseline)
        if self.out_of_range is not None and self.fallback is not None:
            self.embedder, self.fallback = self.fallback, None
            baseline = self._with_ruler(baseline)
        return baseline

    def in_range(self, texts: Sequence[str]) -> tuple[Reading | None, str | None]:
        """How the ruler reads the answers now, and why it cannot."""
        if self.embedder is None or self.reading is None:
            return None, None
        if self.out_of_range is not None:
            return None, self.out_of_range
        reading = self._read(texts, self.centre(self._baseline))
        return reading, out_of_range(reading, self.reading, english=self._english, ruler=self.embedder.label)

    def _with_ruler(self, baseline: Baseline) -> Baseline:
        texts = [s.text for s in baseline.samples]
        if baseline.embedder != self.label:  # taken with another ruler
            baseline = dataclasses.replace(baseline, embeddings=self.embed(texts), embedder=self.label)
        self._baseline = baseline.embeddings
        self.reading = self.out_of_range = None
        if self.embedder is None:
            return baseline
        centre = self.centre(baseline.embeddings)
        english = None
        if centre is None:
            english = self._read([prompt.text for prompt in load_prompts()], None).different
        self._english = english
        self.reading = self._read(texts, centre)
        self.out_of_range = out_of_range(self.reading, None, english=english, ruler=self.embedder.label)
        return baseline

    def _read(self, texts: Sequence[str], centre: np.ndarray | None) -> Reading:
        assert self.embedder is not None
        return read_texts(texts, self.embed, unknown=self.embedder.unknown, centre=centre, seed=self.seed)
