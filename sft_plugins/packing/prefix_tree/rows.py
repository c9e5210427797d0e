"""Packed rows of whole trees: their columns, some rows at a time, gathered from where the tokens lie.

    segments  A B C D | B E F      seq_lengths  4 4      seq_depths  0 1      seq_parents  −1 0

`seq_lengths` are the tokens that the last token of a segment stands at the end of, its path included, so that a segment has
`seq_lengths − seq_depths` tokens of its own. Where a host prunes the two other columns, the lengths of a row with branches
add up to more than it holds, and every reader refuses it: a tree never passes for documents.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.packing.arrow import Ints, TokenColumn
from sft_plugins.packing.prefix_tree.fold import Forest


class Laid(NamedTuple):
    """The columns of some packed rows, flat: tokens, and segments with where each row's begin."""

    ids: Ints
    labels: Ints
    lengths: Ints
    depths: Ints
    parents: Ints
    in_segments: Ints
    in_tokens: Ints


def lay(forest: Forest, trees: Ints, offsets: Ints, documents: Ints, ids: TokenColumn, labels: TokenColumn) -> Laid:
    """Packed rows out of whole trees.

    Args:
        trees: numbers of trees, row after row; offsets: `[rows + 1]`, where each row's begin among them.
        documents: number in the columns of each row that was folded.
    """
    firsts, counts = forest.offsets[trees], np.diff(forest.offsets)[trees]
    before = np.concatenate(([0], np.cumsum(counts)))
    segments = ranges(firsts, counts)
    of_row = np.repeat(np.arange(len(offsets) - 1), np.diff(before[offsets]))
    in_segments = before[offsets]
    moved = (
        np.repeat(before[:-1] - firsts, counts) - in_segments[of_row]
    )  # from numbers in the forest to those in the row
    parents = forest.parents[segments]
    parents = np.where(parents < 0, -1, parents + moved)

    lengths, depths = forest.lengths[segments], forest.depths[segments]
    at = np.concatenate(([0], np.cumsum(lengths)))
    rows = documents[forest.rows[segments]]
    tokens = ids.gather(rows, lengths, depths)
    marks = labels.gather(rows, lengths, depths)
    marks[at[:-1]] = IGNORE_INDEX  # of a branch: its parent's token, repeated
    here = _added_to(forest, segments, at[:-1] - depths)
    marks[here] = tokens[here]
    return Laid(tokens, marks, depths + lengths, depths, parents, in_segments, at[in_segments])


def _added_to(forest: Forest, segments: Ints, origins: Ints) -> Ints:
    """Where tokens lie that one row has laid and another trains. `origins`: where position 0 of each segment would lie."""
    first, last = (np.searchsorted(forest.added[:, 0], segments, side) for side in ("left", "right"))
    which = ranges(first, last - first)
    _, begin, end = forest.added[which].T
    return ranges(begin + np.repeat(origins, last - first), end - begin)


def ranges(firsts: Ints, counts: Ints) -> Ints:
    """[3, 8], [2, 1]   →   [3, 4, 8]"""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(firsts - (ends - counts), counts)
