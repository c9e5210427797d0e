"""Which part of a stream's rows this pass reads, when workers of a DataLoader draw from it.

Invariant: over all workers every row is read once.

    PackStream in the DataLoader       each worker reads its share: rows id, id + n, … of a list; a datasets.IterableDataset
                                       divides its shards itself; anything else is refused
    IterableDataset.from_generator(    the host gives the whole generator to one worker, so that one reads all rows
        lambda: iter(stream))

The host is found on the call stack: nothing else knows who draws from a generator that somebody else made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import datasets
from torch.utils.data import get_worker_info
from torch.utils.data._utils import worker as torch_worker

from sft_plugins.errors import PackingError


class Share(NamedTuple):
    """Part `worker` of `workers`."""

    worker: int = 0
    workers: int = 1


def host_of_this_pass() -> datasets.IterableDataset | None:
    """The `datasets.IterableDataset` that draws from the generator that calls this, if one does."""
    frame = sys._getframe(2) if hasattr(sys, "_getframe") else None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, datasets.IterableDataset):
            return owner
        frame = frame.f_back
    return None


def share_of_this_process(rows: Any, *, hosted: bool) -> Share:
    """What this process reads of `rows`; all of them where a host has divided the work already.

    Raises:
        PackingError: `workers`, if several would each read all of `rows`.
    """
    worker = get_worker_info()
    if worker is None or hosted or worker.num_workers == 1:
        return Share()
    if not isinstance(rows, (datasets.IterableDataset, datasets.Dataset, Sequence)):
        raise PackingError(
            f"{worker.num_workers} DataLoader workers would each pack all of the rows",
            code="workers",
            remedy="use at most one worker, or pass rows that can be divided: a list, a datasets.Dataset, or a "
            "datasets.IterableDataset with as many shards as workers",
        )
    return Share(worker.id, worker.num_workers)


def numbered_rows(rows: Iterable[Any], share: Share) -> Iterator[tuple[int, Any]]:
    """The rows of one share with their numbers; those of a divided `datasets.IterableDataset` count from 0 in each."""
    if isinstance(rows, datasets.IterableDataset) and share.workers > 1:
        return enumerate(rows)
    numbered = enumerate(rows if share.workers > 1 else _whole(iter(rows)))
    return islice(numbered, share.worker, None, share.workers)


def _whole(rows: Iterator[Any]) -> Iterator[Any]:
    """`rows` drawn as outside any worker, so that a source that divides itself among workers gives all of them."""
    end = object()
    while True:
        worker, torch_worker._worker_info = torch_worker._worker_info, None
        try:
            row = next(rows, end)
        finally:
            torch_worker._worker_info = worker
        if row is end:
            return
        yield row
