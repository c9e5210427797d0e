"""Documents of a few tokens, told apart by their ids, and what packed rows hold of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

Row = dict[str, Any]


def document(length: int, number: int = 0, prompt: int = 1) -> Row:
    """`length` tokens that no other document has; the first `prompt` of them without loss."""
    ids = [number * 1000 + i for i in range(1, length + 1)]
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def halved(length: int, number: int = 0) -> Row:
    """A document whose first half carries no loss."""
    return document(length, number, max(1, length // 2))


def halves(*lengths: int) -> list[Row]:
    return [halved(length, number) for number, length in enumerate(lengths)]


def corpus(count: int, longest: int = 12) -> list[Row]:
    lengths = np.random.default_rng(0).integers(2, longest, count).tolist()
    return [document(length, number) for number, length in enumerate(lengths)]


def plain(rows: Any) -> list[Row]:
    return [{name: np.asarray(value).tolist() for name, value in row.items()} for row in rows]


def documents_of(rows: list[Row]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    found = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"])
        ends = list(itertools.accumulate(row["seq_lengths"]))
        for start, end in zip([0, *ends], ends, strict=False):
            found.append((tuple(row["input_ids"][start:end]), tuple(row["labels"][start:end])))
    return sorted(found)


def as_documents(rows: list[Row]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)
