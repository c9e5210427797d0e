"""Packed streams in a DataLoader: every document once with any number of workers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from sft_plugins.errors import PackingError
from sft_plugins.packing.stream import pack_stream
from testkit.documents import Row, as_documents, corpus, documents_of, plain


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
