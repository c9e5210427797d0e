"""Which rows become documents: what is refused, dropped or cut, said once for data sets and streams.

Invariant: every error has a stable code and names the row it concerns; whatever a policy drops or cuts is counted.

    rows → check_columns → check → admit → the documents that are packed, and what was lost on the way
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins._options import one_of
from sft_plugins._rows import already_packed, first_label, integers, length_mismatch, no_supervised_tokens
from sft_plugins.errors import PackingError
from sft_plugins.packing.arrow import Ints, TokenColumn
from sft_plugins.packing.report import FIRST_ROWS, Loss, Tally

_OWN = ("input_ids", "labels")


@dataclass(frozen=True, kw_only=True)
class Policies:
    """What becomes of rows that cannot be packed whole, and of columns that have no place in a packed row."""

    capacity: int
    overflow: str
    unsupervised: str
    extra_columns: str

    def __post_init__(self) -> None:
        one_of("overflow", self.overflow, ("raise", "drop", "truncate"), PackingError)
        one_of("unsupervised", self.unsupervised, ("raise", "drop"), PackingError)
        one_of("extra_columns", self.extra_columns, ("raise", "drop", "carry"), PackingError)


def check_columns(names: Collection[str], policies: Policies) -> list[str]:
    """The columns beyond `input_ids` and `labels`.

    Raises:
        PackingError: `already_packed`, `bad_schema`, `extra_columns`.
    """
    if packed := already_packed(names, PackingError):
        raise packed
    for name in _OWN:
        if name not in names:
            raise PackingError(
                f"there is no {name!r}; found {', '.join(map(str, names)) or 'nothing'}",
                code="bad_schema",
                remedy="mask the rows first, {mask_dataset:`mask_dataset(dataset, PromptMasker(tokenizer))`}",
            )
    extra = [name for name in names if name not in _OWN]
    if extra and policies.extra_columns == "raise":
        raise PackingError(
            f"columns {', '.join(map(str, extra))} have no place in a packed row",
            code="extra_columns",
            remedy="extra_columns='drop' leaves them out, 'carry' keeps a list with one value per document",
        )
    return extra


class Columns(NamedTuple):
    """What the rows hold; `mask` where they came with an attention mask."""

    ids: TokenColumn
    labels: TokenColumn
    mask: TokenColumn | None = None


@dataclass(frozen=True, eq=False)
class Admitted:
    """Documents that are packed: row numbers, tokens and supervised tokens of each; and what was lost on the way."""

    rows: Ints
    lengths: Ints
    supervised: Ints
    lost: dict[str, Loss]


def admit(columns: Columns, policies: Policies, *, first_row: int = 0) -> Admitted:
    """The rows that are documents, cut where the policies say so.

    Args:
        first_row: the number of the first row, for errors and `lost`; `Admitted.rows` count from 0.

    Raises:
        PackingError: with the row, `length_mismatch`, `empty_document`, `first_label`, `padded_row`,
            `no_supervised_tokens`, `overflow`.
    """
    _check(columns, first_row)
    labels, full = columns.labels, columns.ids.length
    supervised_before = labels.count_unlike(IGNORE_INDEX, full)
    lengths, supervised = full, supervised_before
    barren = supervised == 0
    if policies.unsupervised == "raise":
        _refuse(barren, first_row, lambda row, rows: _untrained(int(full[row]), rows))
    long = (full > policies.capacity) & ~barren
    if policies.overflow == "raise":
        _refuse(long, first_row, lambda row, rows: _too_long(int(full[row]), policies.capacity, rows))
    if policies.overflow == "truncate":
        lengths = np.minimum(full, policies.capacity)
        supervised = labels.count_unlike(IGNORE_INDEX, lengths) if long.any() else supervised

    lost: dict[str, Loss] = {}

    def lose(kind: str, which: Ints, tokens: Ints, supervised_tokens: Ints) -> None:
        if which.any():
            lost[kind] = Loss(
                rows=int(which.sum()),
                tokens=int(tokens[which].sum()),
                supervised_tokens=int(supervised_tokens[which].sum()),
                first_rows=tuple((first_row + np.flatnonzero(which)[:FIRST_ROWS]).tolist()),
            )

    cut = long & (policies.overflow == "truncate")
    hollow = cut & (supervised == 0)
    lose("no_supervised_tokens", barren, full, supervised_before)
    lose("overflow", long & (policies.overflow == "drop"), full, supervised_before)
    lose("truncated", cut & ~hollow, full - lengths, supervised_before - supervised)
    lose("truncated_to_prompt", hollow, full, supervised_before)
    rows = np.flatnonzero(~barren & ~hollow & (lengths <= policies.capacity))
    return Admitted(rows, lengths[rows], supervised[rows], lost)


def _check(columns: Columns, first_row: int) -> None:
    ids, labels, mask = columns
    _refuse(
        ids.length != labels.length,
        first_row,
        lambda row, _: length_mismatch("labels", int(labels.length[row]), int(ids.length[row]), PackingError),
    )
    _refuse(ids.length == 0, first_row, lambda _row, _rows: _empty())
    _refuse(labels.first() != IGNORE_INDEX, first_row, lambda _row, rows: first_label(PackingError, rows))
    if mask is not None:
        # dropping or carrying an attention mask must not turn padding into context
        padded = (mask.length != ids.length) | (mask.count_unlike(0, mask.length) != mask.length)
        _refuse(padded, first_row, lambda _row, _rows: _padded())


def _refuse(wrong: Ints, first_row: int, describe: Callable[[int, int], PackingError]) -> None:
    """Raise what `describe(row, how many rows)` gives for the first row that is wrong."""
    if wrong.any():
        row = int(np.argmax(wrong))
        raise describe(row, int(wrong.sum())).at_row(first_row + row)


def _empty() -> PackingError:
    return PackingError("the document is empty", code="empty_document", remedy="filter out rows without tokens")


def _untrained(length: int, rows: int) -> PackingError:
    return no_supervised_tokens(
        length,
        PackingError,
        rows,
        remedy="find out why masking left nothing, or choose {unsupervised:unsupervised='drop'}, which counts them",
    )


def _too_long(length: int, capacity: int, rows: int) -> PackingError:
    return PackingError(
        f"the document has {length:,} tokens and a packed row holds {capacity:,} ({rows:,} such rows)",
        code="overflow",
        remedy="raise {max_length}, or {shorten:choose overflow='drop' or 'truncate', which count what is lost}",
    )


def _padded() -> PackingError:
    return PackingError(
        "attention_mask is not one 1 per token: the row is padded, and packed its padding would be context",
        code="padded_row",
        remedy="tokenise without padding",
    )


# ---- Streams: rows come one by one and are admitted some at a time ----


class Document(NamedTuple):
    row: int
    ids: Ints
    labels: Ints
    others: dict[str, Any]


def admitted_documents(
    numbered: Iterable[tuple[int, Mapping[str, Any]]], tally: Tally, policies: Policies, *, wanted: int
) -> Iterator[Document]:
    """The first `wanted` documents of `numbered` rows, of which no more are read; `tally` counts what is read and lost."""
    rows = iter(numbered)
    while wanted and (read := [_read(row, number, policies) for number, row in islice(rows, wanted)]):
        masks = [mask for _, mask in read]
        columns = Columns(
            TokenColumn.of_arrays([document.ids for document, _ in read]),
            TokenColumn.of_arrays([document.labels for document, _ in read]),
            # a row that came without a mask hides nothing
            TokenColumn.of_arrays(
                [np.ones(len(read[i][0].ids), np.int64) if m is None else m for i, m in enumerate(masks)]
            )
            if any(mask is not None for mask in masks)
            else None,
        )
        admitted = admit(columns, policies, first_row=read[0][0].row)
        tally.read(rows=len(read), tokens=int(columns.ids.length.sum()), lost=admitted.lost)
        wanted -= len(admitted.rows)
        for index, length in zip(admitted.rows.tolist(), admitted.lengths.tolist(), strict=True):
            document = read[index][0]
            yield document._replace(ids=document.ids[:length], labels=document.labels[:length])


def _read(row: Mapping[str, Any], number: int, policies: Policies) -> tuple[Document, Ints | None]:
    """The document of one row, and its attention mask if it has one."""
    try:
        if not isinstance(row, Mapping):
            raise PackingError(f"the row is a {type(row).__name__}; expected a mapping", code="bad_schema")
        extra = check_columns(row, policies)
        ids, labels = (integers(row[name], name, PackingError) for name in _OWN)
        mask = None
        if row.get("attention_mask") is not None:
            mask = integers(row["attention_mask"], "attention_mask", PackingError, booleans=True)
    except PackingError as error:
        raise error.at_row(number) from error
    kept = extra if policies.extra_columns == "carry" else []
    return Document(number, ids, labels, {name: row[name] for name in kept}), mask


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
