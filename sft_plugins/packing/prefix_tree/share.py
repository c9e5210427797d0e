"""What each row shares with the row before it, in sorted order, and the segments of trees that rows become.

Written for numba (`compiled`), runnable as plain Python.

    A B C D        segment 0: A B C D                        the fork's last shared token is repeated, so that a plain
    A B E F        segment 1: B E F, branches at depth 1     next-token loss is right as it stands
    A B            no segment: all of it is there; a token that it trains is labelled there

Invariant: a token that two rows train is never shared: the second branches before it.

A tree that would grow beyond its capacity is cut at a fork, and the new one repeats what stands before the fork. So it is cut
early, where little stands before it: in front of a row whose branches do not all fit any more, but would in a tree anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[Any]


def shared_tokens(
    ids: Sequence[Ints],
    ids_chunk: Ints,
    ids_start: Ints,
    labels: Sequence[Ints],
    labels_chunk: Ints,
    labels_start: Ints,
    length: Ints,
    order: Ints,
    least: int,
    ignore: int,
) -> Ints:
    """How many tokens each row in `order` has in common with the rows before it, up to the first that two of them train.

    Args:
        length: tokens of each row; order: the rows, sorted by `sort_rows`.
        least: forks that would share fewer tokens are not taken.
    """
    longest = 0
    for row in order:
        longest = max(longest, length[row])
    trained = np.zeros(longest, np.bool_)  # which tokens of the path so far some row trains
    found = np.zeros(len(order), np.int64)
    before = -1
    for i in range(len(order)):
        row = order[i]
        size = length[row]
        tokens, at = ids[ids_chunk[row]], ids_start[row]
        marks, mark = labels[labels_chunk[row]], labels_start[row]
        shared = 0
        if before >= 0:
            earlier, there = ids[ids_chunk[before]], ids_start[before]
            for q in range(min(size, length[before])):
                if tokens[at + q] != earlier[there + q] or (trained[q] and marks[mark + q] != ignore):
                    break
                shared = q + 1
        before = row
        if shared < size and shared - 1 < least:
            shared = 0
        for q in range(shared):
            trained[q] |= marks[mark + q] != ignore
        for q in range(shared, size):
            trained[q] = marks[mark + q] != ignore
        found[i] = shared
    return found


def branches(length: Ints, order: Ints, shared: Ints) -> Ints:
    """Tokens that each row in `order` adds to the tree, together with all rows behind it that branch from what it adds."""
    n = len(order)
    found = np.zeros(n, np.int64)
    ends = np.empty(n + 1, np.int64)  # those of the groups that are still open, innermost last
    upto = np.zeros(n + 1, np.int64)
    for i in range(n):
        size = length[order[i]]
        upto[i + 1] = upto[i] + (size - shared[i] + 1 if shared[i] < size else 0)
    count = 0
    for i in range(n - 1, -1, -1):
        while count > 0 and shared[ends[count - 1]] > shared[i]:
            count -= 1
        found[i] = upto[ends[count - 1] if count > 0 else n] - upto[i]
        ends[count] = i
        count += 1
    return found


def share_rows(
    labels: Sequence[Ints],
    labels_chunk: Ints,
    labels_start: Ints,
    length: Ints,
    order: Ints,
    shared_with: Ints,
    together: Ints,
    capacity: int,
    ignore: int,
) -> tuple[Ints, Ints, Ints, Ints, Ints, Ints, Ints, Ints, Ints, Ints]:
    """Segments and trees of the rows in `order`.

    Args:
        length: tokens of each row, all at most `capacity`; order: the rows, sorted by `sort_rows`.
        shared_with: `shared_tokens` of each; together: its `branches`.
        capacity: a tree has no more tokens.

    Returns:
        Of each segment, parents first and trees one after the other: row, position of its first token in it, parent (-1 for a
        root), tree; tokens of each tree; of each row its tree; labels to add where a row trains what an earlier row has laid:
        segment, and positions from, to in its path; `[forks not taken because the tree was full, tokens repeated for them]`.
    """
    n, longest = len(length), 0
    for row in order:
        longest = max(longest, length[row])
    of_row, begin_of = np.empty(n, np.int64), np.empty(n, np.int64)
    parent_of, tree_of = np.empty(n, np.int64), np.empty(n, np.int64)
    tokens_of, in_tree = np.empty(n, np.int64), np.empty(n, np.int64)
    more = np.empty((16, 3), np.int64)
    cut = np.zeros(2, np.int64)
    path = np.empty(longest + 1, np.int64)  # segments on the path, and where they begin
    begins = np.empty(longest + 1, np.int64)
    segments, trees, added, on_path = 0, 0, 0, 0
    for i in range(len(order)):
        row, shared = order[i], shared_with[i]
        size = length[row]
        marks, mark = labels[labels_chunk[row]], labels_start[row]
        new = size - shared + 1  # the fork's token is repeated
        if 0 < shared < size:
            # Where rows share little, large trees would leave more room empty than they save.
            limit = capacity if 2 * (shared - 1) >= new else capacity // 8
            # What branches from this row belongs with it, unless it fits no tree at all.
            wanted = together[i] if together[i] + shared - 1 <= limit else new
            if tokens_of[trees - 1] + wanted > limit:
                cut[0] += 1
                cut[1] += shared - 1
                shared = 0
        if shared > 0:
            owner = 0
            for q in range(1, shared):
                while owner + 1 < on_path and begins[owner + 1] < q:  # a branch's first token is its parent's, repeated
                    owner += 1
                if marks[mark + q] != ignore:
                    segment = path[owner]
                    if added > 0 and more[added - 1, 0] == segment and more[added - 1, 2] == q:
                        more[added - 1, 2] = q + 1
                    else:
                        if added == len(more):
                            wider = np.empty((2 * added, 3), np.int64)
                            wider[:added] = more
                            more = wider
                        more[added, 0], more[added, 1], more[added, 2] = segment, q, q + 1
                        added += 1
            if shared == size:
                in_tree[row] = trees - 1
                continue
            fork = shared - 1
            while begins[on_path - 1] >= fork:
                on_path -= 1
            parent_of[segments] = path[on_path - 1]
            tokens_of[trees - 1] += new
        else:
            fork, on_path = 0, 0
            parent_of[segments] = -1
            tokens_of[trees] = size
            trees += 1
        of_row[segments], begin_of[segments], tree_of[segments], in_tree[row] = row, fork, trees - 1, trees - 1
        path[on_path], begins[on_path] = segments, fork
        on_path += 1
        segments += 1
    more = more[:added]
    return (
        of_row[:segments],
        begin_of[:segments],
        parent_of[:segments],
        tree_of[:segments],
        tokens_of[:trees],
        in_tree,
        more[:, 0].copy(),
        more[:, 1].copy(),
        more[:, 2].copy(),
        cut,
    )
