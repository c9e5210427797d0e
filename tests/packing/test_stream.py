"""Packed streams: every document once, in bounded memory, and the same rows whether or not the stream was interrupted."""

from __future__ import annotations

import doctest
import itertools
import json
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sft_plugins.errors import PackingError
from sft_plugins.packing import stream as module
from sft_plugins.packing.dataset import pack_dataset
from sft_plugins.packing.report import Loss
from sft_plugins.packing.stream import pack_stream

Row = dict[str, Any]


def document(length: int, number: int = 0, prompt: int = 1) -> Row:
    ids = [number * 1000 + i for i in range(1, length + 1)]
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


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


# ---- Order, epochs, state ----


def test_a_stream_can_be_read_again_and_gives_the_same_rows() -> None:
    stream = pack_stream(corpus(100), 30, buffer_size=16)
    assert plain(stream) == plain(stream)


def test_epochs_and_buffers_are_shuffled_differently() -> None:
    rows = [document(2, number) for number in range(40)]
    stream = pack_stream(rows, 8, buffer_size=20)
    first = plain(stream)
    stream.set_epoch(1)
    second = plain(stream)
    assert first != second
    assert documents_of(first) == documents_of(second)
    order = [[token // 1000 % 20 for row in half for token in row["input_ids"]] for half in (first[:5], first[5:])]
    assert order[0] != order[1]
    stream.set_epoch(0)
    assert plain(stream) == first


def sources() -> dict[str, Any]:
    rows = corpus(60)

    def generate(numbers: list[int]) -> Iterator[Row]:
        yield from (rows[number] for number in numbers)

    sharded = IterableDataset.from_generator(generate, gen_kwargs={"numbers": list(range(60))})
    return {
        "list": lambda: rows,
        "generator": lambda: (row for row in rows),
        "dataset": lambda: Dataset.from_list(rows),
        "stream": lambda: Dataset.from_list(rows).to_iterable_dataset(num_shards=4),
        "generated stream": lambda: sharded,
        "shuffled stream": lambda: Dataset.from_list(rows).to_iterable_dataset(num_shards=4).shuffle(3, buffer_size=10),
        "filtered stream": lambda: (
            Dataset.from_list(rows).to_iterable_dataset(num_shards=4).filter(lambda row: len(row["labels"]) > 3)
        ),
    }


@pytest.mark.parametrize("kind", sorted(sources()))
def test_a_resumed_stream_yields_exactly_the_rows_that_would_have_come(kind: str) -> None:
    """At every row, through JSON, in a new object, its report included."""
    options: dict[str, Any] = {"buffer_size": 17, "seed": 4}
    whole = pack_stream(sources()[kind](), 25, **options)
    expected = plain(whole)
    assert len(expected) > 10
    for stop in range(1, len(expected) + 1):
        stopped = pack_stream(sources()[kind](), 25, **options)
        assert plain(itertools.islice(stopped, stop)) == expected[:stop]
        state = json.loads(json.dumps(stopped.state_dict()))
        resumed = pack_stream(sources()[kind](), 25, **options)
        resumed.load_state_dict(state)
        assert plain(resumed) == expected[stop:]
        assert resumed.report == whole.report


@pytest.mark.parametrize("kind", ["stream", "generated stream"])  # datasets 4.8 loses the place in filtered ones
def test_the_state_of_the_source_resumes_exactly_without_reading_from_the_start(kind: str) -> None:
    options: dict[str, Any] = {"buffer_size": 17, "seed": 4, "fast_forward": "state"}
    whole = pack_stream(sources()[kind](), 25, **options)
    expected = plain(whole)
    for stop in range(1, len(expected) + 1):
        stopped = pack_stream(sources()[kind](), 25, **options)
        list(itertools.islice(stopped, stop))
        resumed = pack_stream(sources()[kind](), 25, **options)
        resumed.load_state_dict(pickle.loads(pickle.dumps(stopped.state_dict())))
        assert plain(resumed) == expected[stop:]
        assert resumed.report == whole.report
        assert plain(resumed) == expected  # the pass after a resumed one is whole again


def test_the_state_of_the_source_spares_reading_it() -> None:
    class Counting(list[Row]):
        position, read = 0, 0

        def __iter__(self) -> Iterator[Row]:
            while self.position < len(self):
                self.position += 1
                self.read += 1
                yield self[self.position - 1]

        def state_dict(self) -> int:
            return self.position

        def load_state_dict(self, state: int) -> None:
            self.position = state

    stopped = pack_stream(Counting(corpus(60)), 25, buffer_size=10, fast_forward="state")
    total = len(list(pack_stream(corpus(60), 25, buffer_size=10)))
    list(itertools.islice(stopped, total - 1))
    source = Counting(corpus(60))
    resumed = pack_stream(source, 25, buffer_size=10, fast_forward="state")
    resumed.load_state_dict(stopped.state_dict())
    assert len(list(resumed)) == 1
    assert source.read == 10


def test_a_resumed_stream_keeps_its_epoch() -> None:
    rows = [document(2, number) for number in range(40)]
    stream = pack_stream(rows, 8, buffer_size=20)
    stream.set_epoch(3)
    expected = plain(stream)
    list(itertools.islice(stream, 4))
    resumed = pack_stream(rows, 8, buffer_size=20)
    resumed.load_state_dict(stream.state_dict())
    resumed.set_epoch(3)  # as trainers say again at the start of an epoch
    assert plain(resumed) == expected[4:]


def test_the_pass_after_a_resumed_one_and_another_epoch_start_from_the_beginning() -> None:
    rows = [document(2, number) for number in range(40)]
    stream = pack_stream(rows, 8)
    expected = plain(stream)
    list(itertools.islice(stream, 4))
    stream.load_state_dict(stream.state_dict())
    assert plain(stream) == expected[4:]
    assert plain(stream) == expected
    stream.load_state_dict(stream.state_dict())
    stream.set_epoch(1)
    assert documents_of(plain(stream)) == documents_of(expected)


def test_a_state_of_other_options_or_rows_is_refused() -> None:
    stream = pack_stream(corpus(60), 25, buffer_size=10)
    list(itertools.islice(stream, 30))
    with pytest.raises(PackingError, match="max_length=25 there, 30 here; buffer_size=10 there, 9 here") as error:
        pack_stream(corpus(60), 30, buffer_size=9).load_state_dict(stream.state_dict())
    assert error.value.code == "bad_state"
    shorter = pack_stream(corpus(5), 25, buffer_size=10)
    shorter.load_state_dict(stream.state_dict())
    with pytest.raises(PackingError, match="rows and there are 5") as error:
        next(iter(shorter))
    assert error.value.code == "bad_state"


def test_an_iterator_is_not_packed_twice() -> None:
    """A second pass over a generator would silently miss the documents that the first had in its buffer."""
    stream = pack_stream(iter(corpus(60)), 25)
    next(iter(stream))
    with pytest.raises(PackingError, match="iterator that an earlier pass has consumed") as error:
        next(iter(stream))
    assert error.value.code == "consumed"


# ---- In a DataLoader ----


def test_a_dataloader_takes_the_stream_as_it_is() -> None:
    stream = pack_stream(corpus(60), 25)
    for workers in (0, 1):
        assert plain(DataLoader(stream, batch_size=None, num_workers=workers)) == plain(stream)


def routes() -> dict[str, Any]:
    """What a trainer is given, and what it calls `set_epoch` on."""
    rows = corpus(60)

    def sharded() -> IterableDataset:
        return Dataset.from_list(rows).to_iterable_dataset(num_shards=4)

    def hosted(stream: Any) -> IterableDataset:
        return IterableDataset.from_generator(lambda: iter(stream))

    return {
        "a list": lambda: pack_stream(rows, 25, buffer_size=20),
        "a dataset": lambda: pack_stream(Dataset.from_list(rows), 25, buffer_size=20),
        "a stream": lambda: pack_stream(sharded(), 25, buffer_size=20),
        "a list behind a generator": lambda: hosted(pack_stream(rows, 25, buffer_size=20)),
        "a stream behind a generator": lambda: hosted(pack_stream(sharded(), 25, buffer_size=20)),
        "made anew in a generator": lambda: IterableDataset.from_generator(
            lambda: iter(pack_stream(sharded(), 25, buffer_size=20))
        ),
    }


@pytest.mark.parametrize("route", sorted(routes()))
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, False), (2, False), (2, True), (4, True)])
def test_p18_every_document_once_and_other_packs_in_every_epoch(route: str, workers: int, persistent: bool) -> None:
    """P18: behind a generator 40 (20) of 80 documents came with 2 (4) workers, and the same packs in every epoch."""
    dataset = routes()[route]()
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=persistent)
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(plain(loader))
        assert documents_of(epochs[-1]) == as_documents(corpus(60))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    dataset.set_epoch(1)
    assert plain(loader) == epochs[1]


def test_p18_rows_that_nobody_can_divide_are_refused() -> None:
    """P8: two workers that each read all of the rows would duplicate every document."""

    class Rows:
        def __iter__(self) -> Iterator[Row]:
            return iter(corpus(60))

    with pytest.raises(PackingError, match="2 DataLoader workers would each pack all of the rows"):
        list(DataLoader(pack_stream(Rows(), 25), batch_size=None, num_workers=2))


def test_p18_a_place_is_told_where_it_is_known() -> None:
    """P18: after two workers had read everything, `state_dict()` said place 0."""
    stream = pack_stream(corpus(60), 25, buffer_size=20)
    state = stream.state_dict()
    assert state["place"]["yielded"] == 0
    list(DataLoader(stream, batch_size=None, num_workers=2))
    with pytest.raises(PackingError, match="workers of a DataLoader have read the rows") as error:
        stream.state_dict()
    assert error.value.code == "workers"


def test_p18_each_worker_resumes_at_its_own_place() -> None:
    """As torchdata's StatefulDataLoader does it: states are taken and given back inside the workers."""
    whole = plain(DataLoader(pack_stream(corpus(60), 25, buffer_size=20), batch_size=None, num_workers=2))
    first = DataLoader(Stated(pack_stream(corpus(60), 25, buffer_size=20), stop=3), batch_size=None, num_workers=2)
    rows, states = [], {}
    for worker, row, state in first:
        rows += plain([row])
        states[worker] = state
    again = Stated(pack_stream(corpus(60), 25, buffer_size=20), states=json.loads(json.dumps(states)))
    rest = [row for _, row, _ in DataLoader(again, batch_size=None, num_workers=2)]
    assert sorted(map(str, rows + plain(rest))) == sorted(map(str, whole))
    alone = pack_stream(corpus(60), 25, buffer_size=20)
    alone.load_state_dict(states[0])
    with pytest.raises(PackingError, match="worker 0 of 2, and this is worker 0 of 1") as error:
        next(iter(alone))
    assert error.value.code == "bad_state"


class Stated(torch.utils.data.IterableDataset[Any]):
    def __init__(self, stream: Any, stop: int | None = None, states: Any = None) -> None:
        self.stream, self.stop, self.states = stream, stop, states

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info().id  # type: ignore[union-attr]
        if self.states:
            self.stream.load_state_dict(self.states[str(worker)])
        for row in itertools.islice(self.stream, self.stop):
            yield worker, row, self.stream.state_dict()


def test_it_serves_as_the_generator_of_an_iterable_dataset() -> None:
    """The way into trainers that want a `datasets.IterableDataset`; the boundaries come through (P10)."""
    rows = corpus(60)
    streamed = IterableDataset.from_generator(pack_stream, gen_kwargs={"rows": rows, "max_length": 25})
    assert documents_of(plain(streamed)) == as_documents(rows)


# ---- Policies and bad input: as pack_dataset ----


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
