"""Rows that somebody else tokenised: every mask column is honoured, and none may be shorter than the ids.

A token carries loss where all of `labels`, `completion_mask` and `assistant_masks` that are present say so:

    input_ids        5  6  7  8  2
    completion_mask  0  0  1  1  1      →  labels  −100  −100  7  8  2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins._rows import already_packed, integers, length_mismatch, read_segments
from sft_plugins.errors import MaskingError

MASK_COLUMNS = ("completion_mask", "assistant_masks")


@dataclass(frozen=True)
class Tokenized:
    """A row that somebody else tokenised. `assistant_mask` marks rows whose mask claims to cover every assistant turn."""

    input_ids: list[int]
    labels: list[int]
    assistant_mask: bool = False


def parse_tokenized(row: Mapping[str, Any]) -> Tokenized:
    """`Tokenized` from a row with `input_ids`.

    Raises:
        MaskingError: `bad_schema` where nothing says which tokens carry loss or a column is no list of integers,
            `length_mismatch` where a column's length differs from that of `input_ids`, `already_packed`.
    """
    refuse_packed(row)
    ids, labels = label_arrays(row)
    return Tokenized(ids.tolist(), labels.tolist(), assistant_mask=row.get("assistant_masks") is not None)


def refuse_packed(row: Mapping[str, Any]) -> None:
    """Raises:
    MaskingError: `already_packed` for a row that says where its documents end.
    """
    if packed := already_packed(row, MaskingError):
        raise packed


def label_arrays(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """`(input_ids, labels)`, both int64 `[T]`, of a tokenised row; see `parse_tokenized`."""
    ids = integers(row["input_ids"], "input_ids", MaskingError).astype(np.int64, copy=False)
    masks = [name for name in MASK_COLUMNS if row.get(name) is not None]
    if row.get("labels") is None and not masks:
        raise MaskingError(
            "the row has `input_ids` but no column says which tokens carry loss.",
            code="bad_schema",
            remedy="Add `labels`, `completion_mask` or `assistant_masks`; training every token is never assumed.",
        )
    labels = _column(row, "labels", len(ids)) if row.get("labels") is not None else ids
    for name in masks:
        mask = _column(row, name, len(ids))
        odd = np.flatnonzero((mask != 0) & (mask != 1))
        if odd.size:
            raise MaskingError(
                f"`{name}` must hold 0 and 1 only; at position {int(odd[0])} it holds {int(mask[odd[0]])}.",
                code="bad_schema",
                remedy="Give 1 where a token carries loss and 0 elsewhere; labels go into a column `labels`.",
            )
        labels = np.where(mask == 1, labels, IGNORE_INDEX)
    if row.get("attention_mask") is not None:
        # Rows that were padded when they were tokenised: padding is where the mask says so, not where an id says so.
        real = _column(row, "attention_mask", len(ids)) != 0
        if not real.all():
            edges = np.flatnonzero(np.diff(np.concatenate(([False], real, [False])).astype(np.int8)))
            if not len(edges):
                raise MaskingError(
                    "`attention_mask` holds no 1.", code="bad_schema", remedy="Remove rows of mere padding."
                )
            if len(edges) != 2:
                raise MaskingError(
                    f"`attention_mask` has zeros between ones, the first at position {int(edges[1])}.",
                    code="bad_schema",
                    remedy="Give one document per row; packed rows belong to the packing collator.",
                )
            ids, labels = ids[real], labels[real]
    return ids, labels


class Document(NamedTuple):
    """One document of a row, int64 `[T]` each; of a tree the row that a branch's path stands for.

    Attributes:
        trained_elsewhere: it carries no loss, but tokens that it shares do: which of the rows trains those is not told.
    """

    ids: np.ndarray
    labels: np.ndarray
    trained_elsewhere: bool = False


def documents_of(row: Mapping[str, Any]) -> list[Document]:
    """`label_arrays` of every document of a tokenised row: of the one, or of those that its `seq_lengths` tell apart.

    Documents of trees are their paths; over all of them every label stands once:

        A B C D | B E F, branch at 1    →    A B C D    A B E F         labels of A B stand in the first
    """
    ids, labels = label_arrays(row)
    if row.get("seq_lengths") is None:
        refuse_packed(row)
        return [Document(ids, labels)]
    segments = read_segments(row, ids, MaskingError)
    paths = segments.paths()
    marks: list[np.ndarray] = []  # where the labels of each path stand: a repeated token's is its parent's
    for path, depth, parent in zip(paths, segments.depths, segments.parents, strict=True):
        marks.append(np.concatenate((marks[parent][: depth + 1], path[depth + 1 :])) if depth else path)
    owner = np.repeat(np.arange(len(paths)), segments.lengths)
    for number in np.flatnonzero(segments.depths).tolist():
        _claim_run(number, int(segments.depths[number]), marks, owner, labels != IGNORE_INDEX)
    documents = []
    for number, (path, at) in enumerate(zip(paths, marks, strict=True)):
        own = np.where(owner[at] == number, labels[at], IGNORE_INDEX)
        elsewhere = bool((own == IGNORE_INDEX).all() and (labels[at] != IGNORE_INDEX).any())
        documents.append(Document(ids[path], own, elsewhere))
    return documents


def _claim_run(number: int, depth: int, marks: list[np.ndarray], owner: np.ndarray, trained: np.ndarray) -> None:
    """Give a trained run that goes on in a branch to that branch, unless the row that has it goes on with it too.

    labels … 5 6 −100 …  and a branch behind 6 that goes on with 7      →      5 6 7 is one run, of the branch
    """

    def goes_on(row: int) -> bool:
        return bool(trained[marks[row][depth + 1 : depth + 2]].any())

    whose = owner[marks[number][depth]]
    if not goes_on(number) or goes_on(whose):
        return
    for at in marks[number][depth::-1]:
        if not trained[at] or owner[at] != whose:
            break
        owner[at] = number


def _column(row: Mapping[str, Any], name: str, length: int) -> np.ndarray:
    array = integers(row[name], name, MaskingError, booleans=True).astype(np.int64, copy=False)
    if len(array) != length:
        raise length_mismatch(name, len(array), length, MaskingError)
    return array
