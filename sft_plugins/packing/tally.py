"""Counts of a stream under way, from which its report is made at any time.

Invariant: `to_dict` and `from_dict` are inverse, through JSON too, so a resumed stream reports as an unbroken one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.packing.report import Loss, PackReport, expected_padding


@dataclass
class Tally:
    """What a pass has read and yielded so far; `lengths` counts the documents yielded, per length."""

    rows_in: int = 0
    tokens_in: int = 0
    rows: int = 0
    supervised_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    lost: dict[str, Loss] = field(default_factory=dict)

    def lose(self, kind: str, row: int, tokens: int, supervised_tokens: int) -> None:
        loss = Loss(rows=1, tokens=tokens, supervised_tokens=supervised_tokens, first_rows=(row,))
        self.lost[kind] = self.lost.get(kind, Loss()) + loss

    def add(self, packed: dict[str, Any]) -> None:
        self.rows += 1
        self.supervised_tokens += int(np.count_nonzero(packed["labels"] != IGNORE_INDEX))
        self.lengths.update(packed["seq_lengths"].tolist())

    def report(self, max_length: int) -> PackReport:
        lengths = np.array(sorted(self.lengths), np.int64)
        counts = np.array([self.lengths[length] for length in lengths.tolist()], np.int64)
        return PackReport(
            max_length=max_length,
            rows_in=self.rows_in,
            tokens_in=self.tokens_in,
            documents=int(counts.sum()),
            tokens=int((lengths * counts).sum()),
            supervised_tokens=self.supervised_tokens,
            rows=self.rows,
            longest=int(lengths.max(initial=0)),
            padded=expected_padding(lengths, counts),
            lost=dict(self.lost),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: its object keys are strings, so `lengths` travels as pairs."""
        return asdict(self) | {"lengths": sorted(self.lengths.items())}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tally:
        lost = {kind: Loss(**loss | {"first_rows": tuple(loss["first_rows"])}) for kind, loss in data["lost"].items()}
        return cls(**dict(data) | {"lengths": Counter(dict(map(tuple, data["lengths"]))), "lost": lost})
