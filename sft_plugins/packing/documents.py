"""One document of a stream: read from its row, checked, let through or counted as lost, joined with others.

Invariant: the same rows are refused, dropped and cut as by `pack_dataset`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import PackingError
from sft_plugins.packing.arrow import Ints
from sft_plugins.packing.refusals import (
    already_packed,
    empty_document,
    first_label,
    length_mismatch,
    missing_column,
    padded_row,
    too_long,
    unknown_columns,
    unsupervised_document,
)
from sft_plugins.packing.tally import Tally


class Document(NamedTuple):
    row: int
    ids: Ints
    labels: Ints
    others: dict[str, Any]


def admit(
    numbered: Iterator[tuple[int, Mapping[str, Any]]],
    tally: Tally,
    *,
    capacity: int,
    overflow: str,
    unsupervised: str,
    extra_columns: str,
) -> Iterator[Document]:
    """The documents that the policies let through, cut where they say so; `tally` counts what is read and lost."""
    for number, row in numbered:
        _, ids, labels, others = _read(row, number, extra_columns)
        supervised = int(np.count_nonzero(labels != IGNORE_INDEX))
        tally.rows_in += 1
        tally.tokens_in += len(ids)
        if not supervised:
            if unsupervised == "raise":
                raise unsupervised_document(number)
            tally.lose("no_supervised_tokens", number, len(ids), 0)
            continue
        if len(ids) > capacity:
            if overflow == "raise":
                raise too_long(len(ids), capacity, number)
            if overflow == "drop":
                tally.lose("overflow", number, len(ids), supervised)
                continue
            left = int(np.count_nonzero(labels[:capacity] != IGNORE_INDEX))
            if not left:
                tally.lose("truncated_to_prompt", number, len(ids), supervised)
                continue
            tally.lose("truncated", number, len(ids) - capacity, supervised - left)
        yield Document(number, ids[:capacity], labels[:capacity], others)


def _read(row: Mapping[str, Any], number: int, extra_columns: str) -> Document:
    if not isinstance(row, Mapping):
        raise PackingError(f"the row is a {type(row).__name__}; expected a mapping", code="bad_schema", row=number)
    if "seq_lengths" in row:
        raise already_packed().at_row(number)
    ids, labels = _integers(row, "input_ids", number), _integers(row, "labels", number)
    if len(ids) != len(labels):
        raise length_mismatch(len(ids), len(labels), number)
    if not len(ids):
        raise empty_document(number)
    if labels[0] != IGNORE_INDEX:
        raise first_label(number)
    extra = [name for name in row if name not in ("input_ids", "labels")]
    if extra and extra_columns == "raise":
        raise unknown_columns(extra, number)
    if "attention_mask" in row:
        mask = _integers(row, "attention_mask", number)
        if len(mask) != len(ids) or not mask.all():
            raise padded_row(number)
    return Document(number, ids, labels, {name: row[name] for name in extra} if extra_columns == "carry" else {})


def _integers(row: Mapping[str, Any], name: str, number: int) -> Ints:
    if name not in row:
        raise missing_column(name, list(row), number)
    try:
        array = np.asarray(row[name])
    except ValueError:  # lists of unequal lengths
        array = np.asarray(None)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise PackingError(
            f"{name!r} holds {array.dtype} of shape {array.shape}; expected a flat list of integers",
            code="bad_schema",
            row=number,
        )
    return array


def join(documents: list[Document]) -> dict[str, Any]:
    """The packed row of `documents`."""
    names = documents[0].others.keys()
    for document in documents:
        if document.others.keys() != names:
            raise PackingError(
                f"columns {sorted(document.others)} to carry, and {sorted(names)} in row {documents[0].row}",
                code="bad_schema",
                row=document.row,
                remedy="give every row the same columns",
            )
    return {
        "input_ids": np.concatenate([document.ids for document in documents]),
        "labels": np.concatenate([document.labels for document in documents]),
        "seq_lengths": np.array([len(document.ids) for document in documents], np.int32),
        **{name: [document.others[name] for document in documents] for name in names},
    }
