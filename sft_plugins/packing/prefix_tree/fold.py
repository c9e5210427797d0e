"""Rows → a forest: for each segment the slice of a row that it holds, its parent, its tree. No token is copied.

Invariant: over all rows and over all segments the multiset of (tokens before, trained token) is the same.

    rows  A B C D   A B E F (E F trained)    →    segments  A B C D   B E F      parents −1 0      depths 0 1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.packing.arrow import Ints, TokenColumn
from sft_plugins.packing.compiled import compiled
from sft_plugins.packing.prefix_tree.beginnings import may_share
from sft_plugins.packing.prefix_tree.order import sort_rows
from sft_plugins.packing.prefix_tree.share import branches, share_rows, shared_tokens

LEAST = 8
"""A fork that would share fewer tokens is not taken: each costs a repeated token and a piece of attention of its own."""


@dataclass(frozen=True, eq=False)
class Forest:
    """Rows folded into trees, as flat arrays.

    Attributes:
        rows, depths, lengths: of each segment the row that it is a slice of, the position of its first token in that row, its
            tokens. A branch's first token is its parent's, repeated; it sees `depths` tokens of its parent's path.
        parents: index of the segment that it branches from, -1 for a root. Parents come first.
        offsets: `[trees + 1]`, first segment of each tree; tokens: of each tree. in_tree: of each row its tree.
        added: `[n, 3]`, sorted: (segment, from, to): positions in the path of that segment's row that another row trains.
        cuts, repeated: forks that were not taken because the tree would not have fitted, and the tokens that this repeats.
    """

    rows: Ints
    depths: Ints
    lengths: Ints
    parents: Ints
    offsets: Ints
    tokens: Ints
    in_tree: Ints
    added: Ints
    cuts: int
    repeated: int

    @property
    def shared(self) -> bool:
        """Whether any row shares anything; if not, segments are rows."""
        return len(self.rows) > len(self.tokens) or len(self.rows) < len(self.in_tree)


def fold(ids: TokenColumn, labels: TokenColumn, lengths: Ints, capacity: int, *, least: int = LEAST) -> Forest:
    """Fold rows into trees of at most `capacity` tokens.

    Args:
        ids, labels: of the rows; lengths: how many of their tokens count, at most `capacity`.

    Time is that of reading each shared token two or three times and of sorting; memory that of a few numbers per row.
    """
    order = may_share(ids, lengths, least)
    if not len(order):
        return _apart(lengths)
    ids_in, labels_in = _Readable.of(ids), _Readable.of(labels)
    alone = np.setdiff1d(np.arange(len(lengths)), order, assume_unique=True)
    tokens_in = ids_in.values, ids_in.chunk, ids_in.start
    marks_in = labels_in.values, labels_in.chunk, labels_in.start
    compiled(sort_rows)(*tokens_in, lengths, order)
    shared = compiled(shared_tokens)(*tokens_in, *marks_in, lengths, order, least, IGNORE_INDEX)
    together = compiled(branches)(lengths, order, shared)
    rows, depths, parents, trees, tokens, in_tree, *added, cut = compiled(share_rows)(
        *marks_in, lengths, order, shared, together, capacity, IGNORE_INDEX
    )
    more = np.stack(added, axis=1)
    nothing = np.zeros(len(alone), np.int64)
    rows, depths, parents = (
        np.concatenate(both) for both in ((rows, alone), (depths, nothing), (parents, nothing - 1))
    )
    in_tree[alone] = len(tokens) + np.arange(len(alone))
    trees, tokens = np.concatenate((trees, in_tree[alone])), np.concatenate((tokens, lengths[alone]))
    return Forest(
        rows=rows,
        depths=depths,
        lengths=lengths[rows] - depths,
        parents=parents,
        offsets=np.searchsorted(trees, np.arange(len(tokens) + 1)),
        tokens=tokens,
        in_tree=in_tree,
        added=more[np.argsort(more[:, 0], kind="stable")],
        cuts=int(cut[0]),
        repeated=int(cut[1]),
    )


def _apart(lengths: Ints) -> Forest:
    """Each row a tree of its own."""
    every, nothing = np.arange(len(lengths) + 1), np.zeros(len(lengths), np.int64)
    return Forest(
        rows=every[:-1],
        depths=nothing,
        lengths=lengths,
        parents=nothing - 1,
        offsets=every,
        tokens=lengths,
        in_tree=every[:-1],
        added=np.empty((0, 3), np.int64),
        cuts=0,
        repeated=0,
    )


@dataclass(frozen=True)
class _Readable:
    """A column as compiled loops read it: chunks of one type in one list, numbers of one width."""

    values: Any
    chunk: Ints
    start: Ints = field(repr=False)

    @classmethod
    def of(cls, column: TokenColumn) -> _Readable:
        from numba.typed import List

        values = List()
        for chunk in column.values:
            view = chunk.view()
            view.flags.writeable = False
            values.append(view)
        return cls(values, column.chunk.astype(np.int64), column.start.astype(np.int64))
