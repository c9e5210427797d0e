"""`even_rows`: every document once, as many rows as asked for, and no more of them taken apart than needed."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_plugins.errors import PackingError
from sft_plugins.packing import even_rows, pack_dataset
from sft_plugins.packing.distributed import even_rows as even


def documents(lengths: list[int]) -> Dataset:
    rows = [[number * 100 + i for i in range(length)] for number, length in enumerate(lengths)]
    labels = [[-100, *ids[1:]] for ids in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels, "name": [f"d{i}" for i in range(len(rows))]})


def unpacked(packed: Dataset) -> list[tuple[list[int], list[int], str]]:
    found = []
    for row in packed:
        start = 0
        for length, name in zip(row["seq_lengths"], row["name"], strict=True):
            end = start + length
            found.append((row["input_ids"][start:end], row["labels"][start:end], name))
            start = end
        assert start == len(row["input_ids"]) == len(row["labels"])
    return sorted(found)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=30), st.integers(9, 30), st.integers(1, 12), st.booleans())
def test_every_document_is_there_once_in_an_even_number_of_rows(
    lengths: list[int], capacity: int, multiple: int, shuffled: bool
) -> None:
    """P14: nothing dropped, nothing repeated."""
    packed = pack_dataset(documents(lengths), capacity, extra_columns="carry", seed=0).dataset
    packed = packed.shuffle(1) if shuffled else packed
    if len(packed) + -len(packed) % multiple > len(lengths):
        with pytest.raises(PackingError, match="can be taken apart at") as caught:
            even_rows(packed, multiple)
        assert caught.value.code == "too_few_documents"
        return
    result = even_rows(packed, multiple)
    assert len(result) == -(-len(packed) // multiple) * multiple
    assert unpacked(result) == unpacked(packed)
    assert result.features == packed.features
    assert all(length for row in result for length in row["seq_lengths"])
    old = [row["input_ids"] for row in packed]
    new = [row["input_ids"] for row in result]
    kept = [ids for ids in old if ids in new]
    assert new[: len(kept)] == kept, "what is not taken apart keeps its order"
    assert len(old) - len(kept) <= len(result) - len(packed), "at most one row is taken apart per row added"


def test_nothing_is_done_where_nothing_is_missing() -> None:
    packed = pack_dataset(documents([4, 4, 4, 4]), 8, extra_columns="drop").dataset
    assert even_rows(packed, 2) is packed
    assert even_rows(packed, 1) is packed


def test_the_row_with_most_documents_is_taken_apart() -> None:
    rows: dict[str, Any] = {"seq_lengths": [[5], [1, 2, 3, 4], [3, 3], [4, 4]]}
    rows["input_ids"] = [list(range(sum(lengths))) for lengths in rows["seq_lengths"]]
    rows["labels"] = rows["input_ids"]
    packed = Dataset.from_dict(rows)
    assert even_rows(packed, 5)["seq_lengths"][:] == [[5], [3, 3], [4, 4], [1, 2], [3, 4]]
    assert even_rows(packed, 6)["seq_lengths"][:] == [[5], [3, 3], [4, 4], [1], [2], [3, 4]]


@pytest.mark.parametrize("multiple", [0, -1, 1.5, True, None])
def test_a_multiple_that_is_none_is_refused(multiple: Any) -> None:
    packed = pack_dataset(documents([4, 4]), 8, extra_columns="drop").dataset
    with pytest.raises(PackingError, match="expected an integer from 1 on"):
        even_rows(packed, multiple)


@pytest.mark.parametrize(
    ("rows", "code", "words"),
    [
        (documents([3]), "bad_schema", "no 'seq_lengths'"),
        (documents([3]).to_iterable_dataset(), "streaming_dataset", "all of its rows must be there"),
        (DatasetDict(train=documents([3])), "bad_schema", r"even_rows\(packed\['train'\]"),
        (None, "bad_schema", "got NoneType"),
    ],
    ids=["flat", "stream", "splits", "none"],
)
def test_rows_that_are_not_packed_are_refused(rows: Any, code: str, words: str) -> None:
    with pytest.raises(PackingError, match=words) as caught:
        even_rows(rows, 2)
    assert caught.value.code == code


def test_examples() -> None:
    assert doctest.testmod(even).failed == 0
