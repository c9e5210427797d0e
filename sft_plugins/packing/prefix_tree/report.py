"""What folding rows into trees saved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sft_plugins.packing.arrow import Ints
from sft_plugins.packing.prefix_tree.fold import Forest


@dataclass(frozen=True, kw_only=True)
class PrefixReport:
    """Rows folded into trees. Counts are exact.

    Attributes:
        row_tokens, tree_tokens: tokens of the rows, and of the trees that hold them.
        trees, segments: trees, and the pieces that they consist of; as many of both where nothing is shared.
        attention_saved: share of the pairs (token, token it sees) that need not be computed, 0 to 1.
        cuts, repeated_tokens: forks that were not taken, since the tree would not have fitted a packed row or rows shared too
            little for a large one, and the tokens that stand twice for it.
    """

    row_tokens: int
    tree_tokens: int
    trees: int
    segments: int
    attention_saved: float
    cuts: int
    repeated_tokens: int

    @classmethod
    def of(cls, forest: Forest, lengths: Ints) -> PrefixReport:
        """`lengths`: tokens of each row that was folded."""
        ends = (forest.depths + forest.lengths).astype(np.float64)
        pairs = float(np.sum(ends * (ends + 1) - forest.depths * (forest.depths + 1.0)))
        alone = lengths.astype(np.float64)
        return cls(
            row_tokens=int(lengths.sum()),
            tree_tokens=int(forest.tokens.sum()),
            trees=len(forest.tokens),
            segments=len(forest.rows),
            attention_saved=1 - pairs / float(np.sum(alone * (alone + 1))),
            cuts=forest.cuts,
            repeated_tokens=forest.repeated,
        )

    @property
    def shared_tokens(self) -> int:
        """Tokens of the rows that are kept once for several."""
        return self.row_tokens - self.tree_tokens

    def line(self) -> tuple[str, str, str]:
        """Its line in the table of packing."""
        cut = f"; {self.cuts:,} forks not taken, {self.repeated_tokens:,} tokens repeated" if self.cuts else ""
        tokens = f"{self.row_tokens:,} tokens of rows in trees of {self.tree_tokens:,}"
        return (
            "shared beginnings",
            f"{self.shared_tokens / self.row_tokens:.2%}",
            f"{tokens}; attention saved {self.attention_saved:.0%}{cut}",
        )
