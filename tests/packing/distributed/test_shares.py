"""Who reads which rows, and that a worker knows itself again after each row that is drawn as outside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import _utils
from torch.utils.data._utils.worker import WorkerInfo

from sft_plugins.packing.distributed.shares import Share, numbered_rows

ROWS = [f"row {number}" for number in range(7)]


@pytest.mark.parametrize(("workers", "worker"), [(1, 0), (2, 0), (2, 1), (3, 2), (9, 8)])
def test_a_share_is_every_nth_row_with_its_number(workers: int, worker: int) -> None:
    expected = [(number, row) for number, row in enumerate(ROWS) if number % workers == worker]
    assert list(numbered_rows(ROWS, Share(worker, workers))) == expected


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> WorkerInfo:
    """This process as torch's worker 1 of 2."""
    info = WorkerInfo(id=1, num_workers=2, seed=0, dataset=None)
    monkeypatch.setattr(_utils.worker, "_worker_info", info)
    return info


def drawn(seen: list[Any], *, fails: bool = False) -> Iterator[str]:
    for row in ROWS[:2]:
        seen.append(_utils.worker.get_worker_info())
        yield row
    if fails:
        raise OSError("the source is away")


def test_a_source_is_drawn_whole_and_the_worker_knows_itself_between_rows(inside: WorkerInfo) -> None:
    seen: list[Any] = []
    for _ in numbered_rows(drawn(seen), Share()):
        assert _utils.worker.get_worker_info() is inside
    assert seen == [None, None]
    assert _utils.worker.get_worker_info() is inside


def test_a_worker_knows_itself_after_a_source_that_failed(inside: WorkerInfo) -> None:
    with pytest.raises(OSError, match="the source is away"):
        list(numbered_rows(drawn([], fails=True), Share()))
    assert _utils.worker.get_worker_info() is inside
