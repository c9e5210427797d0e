"""What each row shares with the row before it, in sorted order: one pass, in which rows become segments of trees.

Written for numba (`compiled`), runnable as plain Python.

    A B C D        segment 0: A B C D                        the fork's last shared token is repeated, so that a plain
    A B E F        segment 1: B E F, branches at depth 1     next-token loss is right as it stands
    A B            no segment: all of it is there; a token that it trains is labelled there

Invariant: a token that two rows train is never shared: the second branches before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[Any]


def share_rows(
    ids: Sequence[Ints],
    ids_chunk: Ints,
    ids_start: Ints,
    labels: Sequence[Ints],
    labels_chunk: Ints,
    labels_start: Ints,
    length: Ints,
    order: Ints,
    capacity: int,
    least: int,
    ignore: int,
) -> tuple[Ints, Ints, Ints, Ints, Ints, Ints, Ints, Ints, Ints, Ints]:
    """Segments and trees of the rows in `order`.

    Args:
        length: tokens of each row, all at most `capacity`; order: the rows, sorted by `sort_rows`.
        capacity: a tree has no more tokens.
        least: forks that would share fewer tokens are not taken.

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
    trained = np.zeros(longest, np.bool_)  # which tokens of the path so far some row trains
    path = np.empty(longest + 1, np.int64)  # segments on the path, and where they begin
    begins = np.empty(longest + 1, np.int64)
    segments, trees, added, on_path = 0, 0, 0, 0
    before = -1
    for row in order:
        size = length[row]
        tokens, at = ids[ids_chunk[row]], ids_start[row]
        marks, mark = labels[labels_chunk[row]], labels_start[row]
        shared = 0  # tokens that stand on the path, up to the first that both train
        if before >= 0:
            earlier, there = ids[ids_chunk[before]], ids_start[before]
            for q in range(min(size, length[before])):
                if tokens[at + q] != earlier[there + q] or (trained[q] and marks[mark + q] != ignore):
                    break
                shared = q + 1
        before = row
        new = size - shared + 1  # the fork's token is repeated
        if shared < size:
            if shared - 1 < least:
                shared = 0
            else:
                # Where rows share little, large trees would leave more room empty than they save.
                limit = capacity if 2 * (shared - 1) >= new else capacity // 8
                if tokens_of[trees - 1] + new > limit:
                    cut[0] += 1
                    cut[1] += shared - 1
                    shared = 0
        if shared > 0:
            owner = 0
            for q in range(1, shared):
                while owner + 1 < on_path and begins[owner + 1] < q:  # a branch's first token is its parent's, repeated
                    owner += 1
                if marks[mark + q] != ignore:
                    trained[q] = True
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
        for q in range(shared, size):
            trained[q] = marks[mark + q] != ignore
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
