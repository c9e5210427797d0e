"""Packed streams: order, epochs, and the same rows whether or not the stream was interrupted."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from sft_plugins.errors import PackingError
from sft_plugins.packing.stream import pack_stream
from testkit.documents import Row, corpus, document, documents_of, plain


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
