"""Best-fit decreasing on a histogram: loops over arrays, written for numba (`compiled`), runnable as plain Python.

Invariant: documents of one length are interchangeable, so bins are found for lengths, then documents are dealt out.

    group_by_length → shuffle_groups (with a seed) → fill_bins → list_bins → deal
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[Any]


def group_by_length(sizes: Ints, by_length: Ints, room: int) -> tuple[Ints, Ints]:
    """Counting sort: fills `by_length` with document numbers by length; returns it and where each length starts.

    sizes [3, 5, 3]   →   by_length [0, 2, 1], starts[3] = 0, starts[4] = starts[5] = 2, starts[6] = 3
    """
    starts = np.zeros(room + 2, np.int64)
    for size in sizes:
        starts[size + 1] += 1
    for length in range(room + 1):
        starts[length + 1] += starts[length]
    cursor = starts[:-1].copy()
    for document in range(len(sizes)):
        size = sizes[document]
        by_length[cursor[size]] = document
        cursor[size] += 1
    return by_length, starts


def shuffle_groups(by_length: Ints, starts: Ints, uniform: npt.NDArray[np.float64]) -> None:
    """Shuffle the documents of each length, in place (Fisher–Yates, one number of [0, 1) per document)."""
    for length in range(len(starts) - 1):
        start, end = starts[length], starts[length + 1]
        for i in range(end - 1, start, -1):
            j = start + np.int64(uniform[i] * (i - start + 1))
            by_length[i], by_length[j] = by_length[j], by_length[i]


def fill_bins(counts: Ints, room: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Best-fit decreasing on `counts[length]`; returns the patterns as arrays parent, length, copies, bins.

    A pattern stands for bins of equal contents: what its parent holds plus `copies` documents of `length`; `bins` of
    them were left like that. Pattern 0 is the supply of empty bins.

    While the length falls from `room` to 1, `usable` lists the patterns that still take a document of it, fullest
    first. A bin that took all it can of this length has less free than that, so it waits at its free space; bins come
    off waiting in falling order of free space, each fuller than all that are usable already, so they go in front. No
    search anywhere, and all bins of a pattern are filled in one step.
    """
    n = counts.sum()
    parent = np.empty(n + 1, np.int64)  # one document at least per pattern; pages that are not needed are not touched
    length_of = np.empty(n + 1, np.int32)
    copies_of = np.empty(n + 1, np.int32)
    free = np.empty(n + 1, np.int32)
    bins = np.empty(n + 1, np.int64)
    after = np.empty(n + 1, np.int64)  # next pattern in the list that this one is in
    first = np.full(room + 1, -1, np.int64)  # patterns waiting at each free space, oldest first
    last = np.full(room + 1, -1, np.int64)

    parent[0], length_of[0], copies_of[0], free[0], bins[0], after[0] = -1, 0, 0, room, n, -1
    patterns, usable = 1, 0
    for length in range(room, 0, -1):
        if first[length] >= 0:
            after[last[length]] = usable
            usable = first[length]
        left = counts[length]
        while left > 0:
            source = usable
            copies = free[source] // length
            whole = min(bins[source], left // copies)
            if whole > 0:
                made, patterns = patterns, patterns + 1
                rest = free[source] - copies * length
                parent[made], length_of[made], copies_of[made], free[made] = source, length, copies, rest
                bins[made], after[made] = whole, -1
                if first[rest] < 0:
                    first[rest] = made
                else:
                    after[last[rest]] = made
                last[rest] = made
                bins[source] -= whole
                left -= whole * copies
            if bins[source] == 0:
                usable = after[source]
            elif left > 0:
                # Too few documents are left to fill one more bin with this length. The bin that takes them keeps room
                # for it and is fuller than all others that do.
                made, patterns = patterns, patterns + 1
                parent[made], length_of[made], copies_of[made] = source, length, left
                free[made] = free[source] - left * length
                bins[source] -= 1
                bins[made], after[made] = 1, source if bins[source] > 0 else after[source]
                usable, left = made, 0
    return parent[:patterns], length_of[:patterns], copies_of[:patterns], bins[:patterns]


def list_bins(patterns: tuple[Ints, Ints, Ints, Ints]) -> tuple[Ints, Ints]:
    """The pattern of every bin, and how many documents that bin holds."""
    parent, _, copies_of, bins = patterns
    total = bins[1:].sum()
    pattern_of, documents = np.empty(total, np.int64), np.empty(total, np.int64)
    at = 0
    for pattern in range(1, len(parent)):
        if bins[pattern] > 0:
            count, part = 0, pattern
            while part > 0:
                count += copies_of[part]
                part = parent[part]
            pattern_of[at : at + bins[pattern]] = pattern
            documents[at : at + bins[pattern]] = count
            at += bins[pattern]
    return pattern_of, documents


def deal(
    patterns: tuple[Ints, Ints, Ints, Ints], pattern_of: Ints, offsets: Ints, by_length: Ints, cursor: Ints
) -> Ints:
    """Deal documents to bins: each takes the next ones of the lengths that its pattern asks for, longest in front."""
    parent, length_of, copies_of, _ = patterns
    indices = np.empty_like(by_length)
    for k in range(len(pattern_of)):
        part, at = pattern_of[k], offsets[k + 1]
        while part > 0:  # from the last and shortest documents back to the first
            length, copies = length_of[part], copies_of[part]
            at -= copies
            for j in range(copies):
                indices[at + j] = by_length[cursor[length] + j]
            cursor[length] += copies
            part = parent[part]
    return indices
