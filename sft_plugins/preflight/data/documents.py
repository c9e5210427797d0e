"""Rows that are tokenised already, and the documents that a packed one holds.

seq_lengths 2 3  |  position_ids 0 1 0 1 2      →  documents (0, 2) (2, 5)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from sft_plugins._rows import TREE_COLUMNS, Segments, read_segments
from sft_plugins.errors import MaskingError
from sft_plugins.preflight.data.readers import Row

Kind = Literal["raw", "tokenised", "packed"]


def kind_of(row: Mapping[str, Any]) -> Kind:
    """What a row is, by its columns: `seq_lengths`, rests of trees, or position ids that restart, make it a packed one."""
    if row.get("input_ids") is None:
        return "raw"
    told = any(row.get(name) is not None for name in ("seq_lengths", *TREE_COLUMNS))
    return "packed" if told or len(document_spans(row)) > 1 else "tokenised"


def document_spans(row: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Where the documents of a row with `input_ids` begin and end: `seq_lengths` say, or position ids that restart at 0.

    A row that is not packed, or whose lengths do not add up to it, is one document.

    Raises:
        MaskingError: `prefix_trees` for a row of trees, whose documents are no spans: `segments_of` reads those.
    """
    if any(row.get(name) is not None for name in TREE_COLUMNS):
        raise MaskingError(
            "the row holds trees, and its documents share tokens",
            code="prefix_trees",
            remedy="pack with share_prefixes=False, or read it with `inspect` and `check_masks`",
        )
    length = len(row["input_ids"])
    lengths, positions = row.get("seq_lengths"), row.get("position_ids")
    starts = [0]
    if lengths is not None and sum(lengths) == length and min(lengths, default=0) > 0:
        starts = [0, *itertools.accumulate(int(n) for n in lengths[:-1])]
    elif lengths is None and positions is not None and len(positions) == length:
        starts = sorted({0, *(i for i, position in enumerate(positions) if position == 0)})
    return list(itertools.pairwise([*starts, length]))


def segments_of(row: Mapping[str, Any], ids: np.ndarray) -> Segments | None:
    """The documents of a packed row of `ids`, branches of trees among them; None of any other, and where they do not fit."""
    if kind_of(row) != "packed":
        return None
    try:
        return read_segments(with_lengths(dict(row)), ids, MaskingError)
    except MaskingError:
        return None


def with_lengths(row: Row) -> Row:
    """`row`; one that is packed with position ids gets the `seq_lengths` that say the same, for `check_masks` to read."""
    if row.get("input_ids") is None or any(row.get(name) is not None for name in ("seq_lengths", *TREE_COLUMNS)):
        return row
    spans = document_spans(row)
    return row if len(spans) == 1 else row | {"seq_lengths": [end - start for start, end in spans]}
