"""Documents in memory, folded into trees that are planned and packed: what a stream does with each buffer.

documents 5 6 7 | 5 6 8 | 9    →    trees of 5 and 1 tokens, which stand for documents of 3, 3 and 1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sft_plugins._options import bad_option
from sft_plugins.errors import PackingError
from sft_plugins.packing.arrow import Ints, TokenColumn
from sft_plugins.packing.prefix_tree.fold import fold
from sft_plugins.packing.prefix_tree.report import PrefixReport
from sft_plugins.packing.prefix_tree.rows import lay


class FoldedBuffer:
    """Documents folded into trees.

    Args:
        ids, labels: one array for each document. capacity: of a packed row.

    Attributes:
        tokens: of each tree, which are packed whole. report: what folding did.
    """

    def __init__(self, ids: Sequence[Ints], labels: Sequence[Ints], capacity: int) -> None:
        self._ids, self._labels = TokenColumn.of_arrays(ids), TokenColumn.of_arrays(labels)
        self._forest = fold(self._ids, self._labels, self._ids.length, capacity)
        self._by_tree = np.argsort(self._forest.in_tree, kind="stable")
        self._first = np.searchsorted(self._forest.in_tree[self._by_tree], np.arange(len(self._forest.tokens) + 1))
        self.tokens = self._forest.tokens
        self.report = PrefixReport(cuts=self._forest.cuts, repeated_tokens=self._forest.repeated)

    def row(self, trees: Ints) -> dict[str, Any]:
        """The packed row of `trees`."""
        offsets, all_documents = np.array([0, len(trees)]), np.arange(len(self._ids.length))
        laid = lay(self._forest, trees, offsets, all_documents, self._ids, self._labels)
        of_segments = {"seq_lengths": laid.lengths, "seq_depths": laid.depths, "seq_parents": laid.parents}
        return {
            "input_ids": laid.ids,
            "labels": laid.labels,
            **{name: values.astype(np.int32) for name, values in of_segments.items()},
        }

    def documents(self, trees: Ints) -> Ints:
        """Tokens of each document that `trees` stand for."""
        return np.concatenate([self._ids.length[self._by_tree[self._first[k] : self._first[k + 1]]] for k in trees])


def check_sharing(share_prefixes: bool, carried: Sequence[str]) -> None:
    """Raises:
    PackingError: `bad_option`; `extra_columns` for columns of rows, which a tree does not keep apart.
    """
    if share_prefixes not in (True, False):
        raise bad_option("share_prefixes", share_prefixes, "True or False", PackingError)
    if share_prefixes and carried:
        raise PackingError(
            f"columns {', '.join(map(str, carried))} hold one value per row, and a tree does not keep its rows apart",
            code="extra_columns",
            remedy="extra_columns='drop' beside share_prefixes=True, or share_prefixes=False",
        )
