"""What folding rows into trees saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sft_plugins.packing.arrow import Ints
from sft_plugins.packing.prefix_tree.fold import Forest


@dataclass(frozen=True, kw_only=True)
class PrefixReport:
    """Rows folded into trees. Counts are exact, and those of several add up.

    Attributes:
        row_tokens, tree_tokens: tokens of the rows, and of the trees that hold them.
        trees, segments: trees, and the pieces that they consist of; as many of both where nothing is shared.
        row_pairs, tree_pairs: pairs (token, token that it sees, itself included) of the rows, and of the trees.
        cuts, repeated_tokens: forks that were not taken, since the tree would not have fitted a packed row or rows shared too
            little for a large one, and the tokens that stand twice for it.
    """

    row_tokens: int = 0
    tree_tokens: int = 0
    trees: int = 0
    segments: int = 0
    row_pairs: int = 0
    tree_pairs: int = 0
    cuts: int = 0
    repeated_tokens: int = 0

    @classmethod
    def of(cls, forest: Forest, lengths: Ints) -> PrefixReport:
        """`lengths`: tokens of each row that was folded."""
        return cls.of_rows(lengths, forest.depths, forest.lengths) + cls(
            cuts=forest.cuts, repeated_tokens=forest.repeated
        )

    @classmethod
    def of_rows(cls, lengths: Ints, depths: Ints, own: Ints) -> PrefixReport:
        """Of the trees of some rows: `lengths` of the rows; depths and tokens of its `own` of each segment."""
        return cls(
            row_tokens=int(lengths.sum()),
            tree_tokens=int(own.sum()),
            trees=int(np.count_nonzero(depths == 0)),
            segments=len(depths),
            row_pairs=_pairs(lengths),
            tree_pairs=_pairs(depths + own) - _pairs(depths),
        )

    def __add__(self, other: PrefixReport) -> PrefixReport:
        mine, theirs = asdict(self), asdict(other)
        return PrefixReport(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def shared_tokens(self) -> int:
        """Tokens of the rows that are kept once for several."""
        return self.row_tokens - self.tree_tokens

    @property
    def tokens_saved(self) -> float:
        """Share of the tokens that projections, experts and the head need not see, 0 to 1."""
        return self.shared_tokens / self.row_tokens if self.row_tokens else 0.0

    @property
    def attention_saved(self) -> float:
        """Share of the pairs (token, token that it sees) that need not be computed, 0 to 1."""
        return 1 - self.tree_pairs / self.row_pairs if self.row_pairs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the fields, and what follows from them."""
        names = ("shared_tokens", "tokens_saved", "attention_saved")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def line(self) -> tuple[str, str, str]:
        """Its line in the table of packing."""
        cut = f"; {self.cuts:,} forks not taken, {self.repeated_tokens:,} tokens repeated" if self.cuts else ""
        tokens = f"{self.row_tokens:,} tokens of rows in trees of {self.tree_tokens:,}"
        return (
            "shared beginnings",
            f"{self.tokens_saved:.2%}",
            f"{tokens}; attention saved {self.attention_saved:.0%}, all else {self.tokens_saved:.0%}{cut}",
        )


def _pairs(lengths: Ints) -> int:
    wide = lengths.astype(np.int64, copy=False)
    return (int(wide @ wide) + int(wide.sum())) // 2
