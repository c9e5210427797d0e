"""Which documents share a row: exact best-fit decreasing, planned on the histogram of lengths.

Invariant: the bins are exactly those of item-level best-fit decreasing (longest document first, each into the fullest
bin it fits, among equally full bins the one that has been that full longest). Documents of one length are
interchangeable, so the search runs over lengths, and documents are dealt out afterwards: two passes over n, no more.

    lengths [3, 5, 2, 5, 3], capacity 8   →   histogram {5: 2, 3: 2, 2: 1}
    5s open two bins with 3 free; each takes a 3; the 2 opens a third   →   (5, 3) (5, 3) (2)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sft_plugins._options import whole_number
from sft_plugins.errors import PackingError
from sft_plugins.packing.best_fit import deal, fill_bins, group_by_length, list_bins, shuffle_groups
from sft_plugins.packing.compiled import compiled

MAX_CAPACITY = 2**31 - 1
"""Longest row: document boundaries reach attention kernels as int32."""


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Packs of document numbers, as two flat arrays.

    `plan[k]` holds the documents of pack k, longest first: `indices[offsets[k]:offsets[k + 1]]`.

    Attributes:
        offsets: int64 `[packs + 1]`, starts at 0.
        indices: int32 `[n]` (int64 from 2³¹ documents on), every document number exactly once.
        max_length: capacity of a pack, in tokens.
        tokens: sum of all lengths.
    """

    offsets: npt.NDArray[np.int64]
    indices: npt.NDArray[np.signedinteger]
    max_length: int
    tokens: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> npt.NDArray[np.signedinteger]:
        count, k = len(self), operator.index(pack)
        if not -count <= k < count:
            raise IndexError(f"pack {pack} of a plan with {count}")
        k %= count
        return self.indices[self.offsets[k] : self.offsets[k + 1]]

    def __iter__(self) -> Iterator[npt.NDArray[np.signedinteger]]:
        return (self[k] for k in range(len(self)))

    @property
    def lower_bound(self) -> int:
        """⌈Σ lengths / max_length⌉: no packing whatsoever has fewer packs."""
        return -(-self.tokens // self.max_length)

    @property
    def fill(self) -> float:
        """Share of the packs' capacity that holds tokens; 1.0 for the empty plan, which wastes nothing."""
        return self.tokens / (len(self) * self.max_length) if len(self) else 1.0


def plan_packs(
    lengths: npt.ArrayLike, max_length: int, *, seed: int | Sequence[int] | np.random.Generator | None = None
) -> PackPlan:
    """Assign documents to as few packs of `max_length` tokens as best-fit decreasing finds.

    Equal to, for n documents in O(n·packs):

        for i in sorted(range(n), key=lambda i: -lengths[i]):
            fits = [b for b in bins if b.free >= lengths[i]]
            min(fits, key=lambda b: (b.free, b.since), default=new_bin()).add(i)

    but in O(n + max_length + number of distinct bins). Planning again with another seed costs the same, so every
    epoch can have its own packs.

    Args:
        lengths: `[n]` integers in 1..max_length, tokens per document: list, NumPy array, tensor or Arrow array.
        max_length: capacity of a pack in tokens, 1 to 2³¹ − 1.
        seed: anything `numpy.random.default_rng` takes. Shuffles documents of equal length among one another and the
            order of the packs; how many packs there are and which lengths share one never changes. `None` keeps equal
            lengths in the order of the data and packs of long documents in front.

    Raises:
        PackingError: `bad_capacity`, `bad_lengths` (not integers, negative), `empty_document`, `overflow`; the last
            three with the row.

    Example:
        >>> plan = plan_packs([3, 5, 2, 5, 3], 8)
        >>> [pack.tolist() for pack in plan]
        [[1, 0], [3, 4], [2]]
        >>> len(plan), plan.lower_bound, plan.fill
        (3, 3, 0.75)

    Source: best-fit decreasing, Johnson, "Fast algorithms for bin packing" (1974); for packing documents, Ding et al.,
        "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
    """
    capacity = check_capacity(max_length)
    sizes = _check_lengths(lengths, capacity)
    tokens = int(sizes.sum(dtype=np.int64))
    n = len(sizes)
    dtype = np.int32 if n < 2**31 else np.int64
    if n == 0:
        return PackPlan(np.zeros(1, np.int64), np.zeros(0, dtype), capacity, 0)

    rng = None if seed is None else np.random.default_rng(seed)
    # One bin of `tokens` holds everything, so a larger histogram would only cost memory.
    room = min(capacity, tokens)
    by_length, starts = compiled(group_by_length)(sizes, np.empty(n, dtype), room)
    if rng is not None:
        compiled(shuffle_groups)(by_length, starts, rng.random(n))
    patterns = compiled(fill_bins)(np.diff(starts), room)
    pattern_of, documents = compiled(list_bins)(patterns)
    if rng is not None:
        order = rng.permutation(len(pattern_of))
        pattern_of, documents = pattern_of[order], documents[order]
    offsets = np.zeros(len(pattern_of) + 1, np.int64)
    np.cumsum(documents, out=offsets[1:])
    indices = compiled(deal)(patterns, pattern_of, offsets, by_length, starts[:-1])
    return PackPlan(offsets, indices, capacity, tokens)


def check_capacity(max_length: int) -> int:
    """`max_length` as an int, or `PackingError` with code `bad_capacity`."""
    return whole_number(
        "max_length",
        max_length,
        PackingError,
        most=MAX_CAPACITY,
        code="bad_capacity",
        remedy="give the number of tokens that one packed row may hold, 4096 say",
    )


def _check_lengths(lengths: npt.ArrayLike, capacity: int) -> npt.NDArray[np.int32]:
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise PackingError(
            f"lengths have type {array.dtype} and shape {array.shape}; expected one integer per document",
            code="bad_lengths",
            row=_first_odd_one(array),
            remedy="pass the token count of each document, `[len(ids) for ids in input_ids]`",
        )
    if array.size and (array.min() < 1 or array.max() > capacity):
        row = int(np.argmax((array < 1) | (array > capacity)))
        length = int(array[row])
        if length < 0:
            raise PackingError(f"length {length} is negative", code="bad_lengths", row=row)
        if length == 0:
            raise PackingError(
                "the document is empty", code="empty_document", row=row, remedy="filter out rows without tokens"
            )
        raise PackingError(
            f"the document has {length} tokens and a pack holds {capacity}",
            code="overflow",
            row=row,
            remedy="raise max_length, or let `pack_dataset(..., overflow='drop' or 'truncate')` cut it and count it",
        )
    return array.astype(np.int32, copy=False)


def _first_odd_one(array: npt.NDArray[Any]) -> int | None:
    """The first row that is no integer, where that can be told (NaN, 2.5, None)."""
    if array.ndim != 1 or array.dtype.kind not in "fO":
        return None
    for row, value in enumerate(array.tolist()):
        if not isinstance(value, int) and not (isinstance(value, float) and value.is_integer()):
            return row
    return None
