"""Rows that are tokenised already, and the documents that a packed one holds.

seq_lengths 2 3  |  position_ids 0 1 0 1 2      →  documents (0, 2) (2, 5)
"""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from sft_plugins.preflight.readers import Row

if TYPE_CHECKING:
    from sft_plugins.masking import MaskReport

Kind = Literal["raw", "tokenised", "packed"]
TOKEN_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks")


def kind_of(row: Mapping[str, Any]) -> Kind:
    """What a row is, by its columns: `seq_lengths`, or position ids that restart, make it a packed one."""
    if row.get("input_ids") is None:
        return "raw"
    return "packed" if row.get("seq_lengths") is not None or len(document_spans(row)) > 1 else "tokenised"


def document_spans(row: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Where the documents of a row with `input_ids` begin and end: `seq_lengths` say, or position ids that restart at 0.

    A row that is not packed, or whose lengths do not add up to it, is one document.
    """
    length = len(row["input_ids"])
    lengths, positions = row.get("seq_lengths"), row.get("position_ids")
    starts = [0]
    if lengths is not None and sum(lengths) == length and min(lengths, default=0) > 0:
        starts = [0, *itertools.accumulate(int(n) for n in lengths[:-1])]
    elif lengths is None and positions is not None and len(positions) == length:
        starts = sorted({0, *(i for i, position in enumerate(positions) if position == 0)})
    return list(itertools.pairwise([*starts, length]))


def documents_of(row: Row) -> list[Row]:
    """The documents of a tokenised row, each with the row's mask columns; a row that is not packed, as it came.

    Of a packed row whose `seq_lengths` do not add up to it nobody knows the documents: it comes whole, with no labels, so
    that it is counted as `length_mismatch`.
    """
    ids, lengths = row.get("input_ids"), row.get("seq_lengths")
    if ids is None:
        return [row]  # `check_masks` says what is wrong with it
    if lengths is not None and (sum(lengths) != len(ids) or min(lengths, default=0) < 1):
        return [{"input_ids": ids, "labels": []}]
    spans = document_spans(row)
    if len(spans) == 1:
        return [row]
    names = [name for name in TOKEN_COLUMNS if row.get(name) is not None]
    return [{name: row[name][start:end] for name in names} for start, end in spans]


def check_documents(rows: Iterable[Row], tokenizer: Any) -> MaskReport:
    """`check_masks` on every document of tokenised rows, packed or not.

    Where rows are packed, documents are what is counted, and failures name the row and the document in it.

    Raises:
        MaskingError: as `check_masks`.
    """
    from sft_plugins.masking import check_masks

    firsts: list[int] = []  # of each row, the number of its first document: rows of 3, 1, 2 documents → 0 3 4

    def numbered() -> Iterator[Row]:
        number = 0
        for row in rows:
            firsts.append(number)
            for document in documents_of(row):
                yield document
                number += 1

    def place(number: int) -> tuple[int, int]:
        row = bisect_right(firsts, number) - 1
        return row, number - firsts[row]

    report = check_masks(numbered(), tokenizer)
    if report.rows_in == len(firsts):
        return report
    for code, found in report.failures.items():
        places = [place(number) for number in found.first_rows]
        report.failures[code] = dataclasses.replace(
            found, first_rows=[row for row, _ in places], first_documents=[document for _, document in places]
        )
    report.longest = [(place(number)[0], tokens) for number, tokens in report.longest]
    report.notes.append("rows are packed: what is counted are their documents, each checked by itself")
    return report
