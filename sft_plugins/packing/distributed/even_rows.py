"""As many packed rows as the processes take together, so that none is trained twice.

Invariant: the documents of the result are those of the given rows, each once; only rows that are taken apart are new.

accelerate gives every process equally many rows. Where they do not come out even it begins anew at the first row, and those
documents are trained twice in that epoch. Packed rows can be taken apart between two documents (or trees) instead:

    seq_lengths [3, 2, 4], [8]   for a multiple of 2   →   as they are
    seq_lengths [3, 2, 4], [8], [9]                    →   [3, 2], [8], [9], [4]
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from sft_plugins._options import whole_number
from sft_plugins.errors import PackingError
from sft_plugins.packing.arrow import TokenColumn
from sft_plugins.packing.distributed.row_cost import packed_rows

_PER_TOKEN = ("input_ids", "labels")


def even_rows(packed: Dataset, multiple_of: int) -> Dataset:
    """Take some of the packed rows apart, so that their number is a multiple of `multiple_of`.

    For training that sees every document exactly once per epoch, `multiple_of` is the number of processes ×
    `per_device_train_batch_size`; gradient accumulation does not matter. Fewer than `multiple_of` rows are added.

    Args:
        packed: rows with `seq_lengths`, as `pack_dataset` makes them, columns carried along included.

    Returns:
        The same dataset if nothing is missing; else the untouched rows in their order (`select`, nothing is copied), then
        the rows that were taken apart. The same rows and `multiple_of` give the same result in every process. Before
        `deal_rows`, not after it.

    Raises:
        PackingError: `bad_option`; `bad_schema` if the rows are not packed; `too_few_documents`.

    Example:
        >>> rows = {"input_ids": [[5, 6, 7, 8], [9, 3]], "labels": [[-100, 6, -100, 8], [-100, 3]]}
        >>> packed = Dataset.from_dict(rows | {"seq_lengths": [[2, 2], [2]]})
        >>> even_rows(packed, 3)["input_ids"][:]
        [[9, 3], [5, 6], [7, 8]]
    """
    multiple = whole_number("multiple_of", multiple_of, PackingError)
    packed_rows(packed, call="even_rows(packed['train'], multiple_of)")
    missing = -len(packed) % multiple
    if not missing:
        return packed
    pieces = _pieces(_wholes(packed), missing)
    taken = sorted({row for row, _, _ in pieces})
    untouched = np.setdiff1d(np.arange(len(packed)), taken)
    stored = packed.with_format(None)  # a format turns values into arrays, and may leave columns out
    apart = Dataset.from_list(list(_cut(stored, pieces)), features=packed.features)
    format_ = dict(packed.format)
    return concatenate_datasets([stored.select(untouched), apart]).with_format(
        **format_, **format_.pop("format_kwargs")
    )


def _pieces(documents: np.ndarray, missing: int) -> list[tuple[int, int, int]]:
    """`missing` cuts, always through the middle of the piece with most documents: `(row, first document, end)` of each piece.

    documents per row [3, 1], 1 missing   →   (0, 0, 1), (0, 1, 3)
    """
    if (left := int((documents - 1).sum())) < missing:
        raise PackingError(
            f"{missing} more rows are needed, and the rows can be taken apart at {left} places only",
            code="too_few_documents",
            remedy="use fewer processes or smaller batches, or pack into shorter rows",
        )
    # No row is cut before those with more documents, so the first `missing` of them hold all the cuts.
    most = np.argsort(-documents, kind="stable")[:missing]
    heap = [(-int(documents[row]), int(row), 0) for row in most]
    heapq.heapify(heap)
    for _ in range(missing):
        count, row, first = heapq.heappop(heap)
        half = -count // 2
        heapq.heappush(heap, (-half, row, first))
        heapq.heappush(heap, (count + half, row, first + half))
    pieces = [(row, first, first - count) for count, row, first in heap]
    return sorted(piece for piece in pieces if piece[2] - piece[1] < documents[piece[0]])


def _wholes(packed: Dataset) -> np.ndarray:
    """How many documents each row holds, or trees, between which it can be taken apart."""
    if "seq_parents" not in packed.column_names:
        return TokenColumn.of(packed, "seq_lengths").length
    parents = TokenColumn.of(packed, "seq_parents")
    return parents.length - parents.count_unlike(-1, parents.length)


def _cut(packed: Dataset, pieces: list[tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    for row, first, end in pieces:
        whole = packed[row]
        lengths = np.asarray(whole["seq_lengths"])
        roots = np.arange(len(lengths))
        if "seq_parents" in whole:
            lengths = lengths - whole["seq_depths"]
            roots = np.flatnonzero(np.asarray(whole["seq_parents"]) < 0)
        begins, ends = np.append(roots, len(lengths)), np.concatenate([[0], np.cumsum(lengths)])
        segments = slice(begins[first], begins[end])
        tokens = slice(ends[segments.start], ends[segments.stop])
        piece = {name: values[tokens if name in _PER_TOKEN else segments] for name, values in whole.items()}
        if "seq_parents" in piece:
            piece["seq_parents"] = [
                parent if parent < 0 else parent - segments.start for parent in piece["seq_parents"]
            ]
        yield piece
