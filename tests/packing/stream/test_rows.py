"""Packed streams: every document once, in bounded memory, under the policies of `pack_dataset`."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_plugins.errors import PackingError
from sft_plugins.packing import stream as module
from sft_plugins.packing.dataset import pack_dataset
from sft_plugins.packing.report import Loss
from sft_plugins.packing.stream import pack_stream
from testkit.documents import Row, as_documents, corpus, document, documents_of, plain


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=50), st.integers(9, 30), st.integers(1, 20))
def test_documents_in_are_documents_out(lengths: list[int], capacity: int, buffer_size: int) -> None:
    """P8: whatever the buffer, its tail included."""
    rows = [document(length, number) for number, length in enumerate(lengths)]
    stream = pack_stream(rows, capacity, buffer_size=buffer_size)
    packed = plain(stream)
    assert documents_of(packed) == as_documents(rows)
    assert all(len(row["input_ids"]) <= capacity for row in packed)
    report = stream.report
    assert (report.rows_in, report.documents, report.rows) == (len(rows), len(rows), len(packed))
    assert report.tokens_in == report.tokens == sum(lengths)


def test_a_buffer_that_holds_everything_packs_as_the_dataset_does() -> None:
    rows = corpus(200)
    packed, report = pack_dataset(Dataset.from_list(rows), 64, seed=None)
    stream = pack_stream(rows, 64, seed=None)
    assert plain(stream) == list(packed)
    assert stream.report == report


def test_rows_are_arrays_with_the_columns_of_a_packed_dataset() -> None:
    (row,) = pack_stream([document(3), document(2, 1)], 8)
    assert {name: (value.dtype, value.tolist()) for name, value in row.items()} == {
        "input_ids": (np.int64, [1, 2, 3, 1001, 1002]),
        "labels": (np.int64, [-100, 2, 3, -100, 1002]),
        "seq_lengths": (np.int32, [3, 2]),
    }


def test_the_source_is_read_one_buffer_ahead_and_no_more() -> None:
    read = []

    def rows() -> Iterator[Row]:
        for number in itertools.count():
            read.append(number)
            yield document(4, number)

    packed = iter(pack_stream(rows(), 8, buffer_size=10))
    assert read == []
    for rows_read, _ in zip([10] * 5 + [20] * 5, packed, strict=False):
        assert len(read) == rows_read


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, tuple])
def test_rows_come_as_lists_arrays_or_tensors(form: Any) -> None:
    rows = [{name: form(values) for name, values in row.items()} for row in corpus(20)]
    assert documents_of(plain(pack_stream(rows, 20))) == as_documents(corpus(20))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=30),
    st.integers(1, 12),
    st.sampled_from(["drop", "truncate"]),
    st.sampled_from([4, 1000]),
)
def test_policies_leave_and_count_what_those_of_pack_dataset_do(
    shapes: list[tuple[int, int]], capacity: int, overflow: str, buffer_size: int
) -> None:
    """P9, M13: truncated rests are never documents, and what is lost is counted."""
    rows = [document(length, number, min(prompt, length)) for number, (length, prompt) in enumerate(shapes)]
    options: dict[str, Any] = {"overflow": overflow, "unsupervised": "drop"}
    stream = pack_stream(rows, capacity, buffer_size=buffer_size, **options)
    try:
        packed, report = pack_dataset(Dataset.from_list(rows), capacity, **options)
    except PackingError:
        with pytest.raises(PackingError, match="no document to pack"):
            list(stream)
        return
    assert documents_of(plain(stream)) == documents_of(list(packed))
    ours, theirs = stream.report.to_dict(), report.to_dict()
    for name in ("rows_in", "tokens_in", "documents", "tokens", "supervised_tokens", "longest", "padded", "lost"):
        assert ours[name] == theirs[name]


def test_a_cut_document_is_counted_with_its_row_in_the_stream() -> None:
    stream = pack_stream([document(3), document(12, 1, prompt=5)], 8, buffer_size=1, overflow="truncate")
    list(stream)
    assert stream.report.lost == {"truncated": Loss(rows=1, tokens=4, supervised_tokens=4, first_rows=(1,))}


def test_further_columns_are_refused_dropped_or_carried() -> None:
    rows = [row | {"source": f"s{i}"} for i, row in enumerate(corpus(3, longest=4))]
    with pytest.raises(PackingError, match="columns source") as error:
        list(pack_stream(rows, 12))
    assert (error.value.code, error.value.row) == ("extra_columns", 0)
    assert all("source" not in row for row in pack_stream(rows, 12, extra_columns="drop"))
    (row,) = pack_stream(rows, 12, extra_columns="carry")
    assert row["source"] == [
        f"s{token // 1000}" for token in row["input_ids"][np.cumsum([0, *row["seq_lengths"][:-1]])]
    ]
    with pytest.raises(PackingError, match=r"columns \[\] to carry, and \['source'\] in row") as error:
        list(pack_stream([*rows, document(2)], 12, extra_columns="carry", seed=None))
    assert (error.value.code, error.value.row) == ("bad_schema", 3)


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        ({"input_ids": [], "labels": []}, "empty_document", "the document is empty"),
        ({"input_ids": [1, 2], "labels": [-100]}, "length_mismatch", "2 input_ids and 1 labels"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "first_label", "the first label is not -100"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "no_supervised_tokens", "every label is -100"),
        (document(9), "overflow", "9 tokens and a packed row holds 8"),
        (
            {"input_ids": None, "labels": [-100]},
            "bad_schema",
            "input_ids must be a flat list of integers, got . dimensions of object",
        ),
        (
            {"input_ids": [1, None], "labels": [-100, 2]},
            "bad_schema",
            "input_ids must be a flat list of integers, got . dimensions of object",
        ),
        (
            {"input_ids": [1, float("nan")], "labels": [-100, 2]},
            "bad_schema",
            "input_ids must be a flat list of integers, got 1 dimensions of float64",
        ),
        (
            {"input_ids": [True, False], "labels": [-100, 2]},
            "bad_schema",
            "input_ids must be a flat list of integers, got 1 dimensions of bool",
        ),
        ({"input_ids": [[1], [2, 3]], "labels": [-100, 2]}, "bad_schema", "must be a flat list of integers"),
        ({"input_ids": [1, 2]}, "bad_schema", "no 'labels'; found input_ids"),
        ([1, 2], "bad_schema", "the row is a list; expected a mapping"),
        (document(3) | {"seq_lengths": [3]}, "already_packed", "packed already"),
    ],
)
def test_bad_rows_are_refused_with_their_number(row: Any, code: str, words: str) -> None:
    with pytest.raises(PackingError, match=words) as error:
        list(pack_stream([document(3), row], 8))
    assert (error.value.code, error.value.row) == (code, 1)


def test_padding_never_becomes_context() -> None:
    with pytest.raises(PackingError, match="the row is padded") as error:
        list(pack_stream([document(3) | {"attention_mask": [1, 1, 0]}], 8, extra_columns="drop"))
    assert (error.value.code, error.value.row) == ("padded_row", 0)


def test_a_stream_without_documents_raises() -> None:
    with pytest.raises(PackingError, match="no document to pack: 0 rows") as error:
        list(pack_stream([], 8))
    assert error.value.code == "empty_dataset"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"max_length": 0}, "bad_capacity", "max_length is 0"),
        ({"buffer_size": 0}, "bad_option", "buffer_size is 0; expected an integer from 1 on"),
        ({"buffer_size": 2.5}, "bad_option", "buffer_size is 2.5"),
        ({"overflow": "split"}, "bad_option", "expected one of 'raise', 'drop', 'truncate'"),
        ({"fast_forward": "seek"}, "bad_option", "expected one of 'replay', 'state'"),
        ({"fast_forward": "state"}, "bad_option", "list has none"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(PackingError, match=words) as error:
        pack_stream(corpus(3), **{"max_length": 8, **options})
    assert error.value.code == code


def test_the_worked_example_holds() -> None:
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0
