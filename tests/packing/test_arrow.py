"""A file of packed rows is whole: every batch is in it, or the write that failed is the error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, load_from_disk

from sft_plugins.packing import dataset as module
from sft_plugins.packing import pack_dataset

BATCHES = 4


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Documents that fill `BATCHES` rows of 8 tokens, on disk; a batch is one row."""
    monkeypatch.setattr(module, "BATCH_TOKENS", 8)
    ids = [[10 * number + place for place in range(1, 9)] for number in range(BATCHES)]
    Dataset.from_dict({"input_ids": ids, "labels": [[-100, *one[1:]] for one in ids]}).save_to_disk(tmp_path / "rows")
    return load_from_disk(tmp_path / "rows")


class FullDisk:
    """Arrow's writer of a stream, on a disk that has no room for one of the batches."""

    def __init__(self, writer: Any, failing: int | None) -> None:
        self._writer, self._failing, self.written = writer, failing, 0

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write_batch(self, batch: pa.RecordBatch) -> None:
        self.written += 1
        if self.written - 1 == self._failing:
            raise OSError(28, "No space left on device")
        self._writer.write_batch(batch)


def on_a_disk(monkeypatch: pytest.MonkeyPatch, failing: int | None) -> list[FullDisk]:
    made: list[FullDisk] = []
    own = pa.ipc.new_stream

    def new_stream(sink: Any, schema: Any) -> FullDisk:
        made.append(FullDisk(own(sink, schema), failing))
        return made[-1]

    monkeypatch.setattr(pa.ipc, "new_stream", new_stream)
    return made


def test_every_batch_is_in_the_file(rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = on_a_disk(monkeypatch, failing=None)
    packed, _ = pack_dataset(rows, 8, cache_file=tmp_path / "packed.arrow")
    assert [disk.written for disk in made] == [BATCHES]
    assert sorted(packed["input_ids"]) == sorted(rows["input_ids"])
    assert packed.cache_files == [{"filename": str(tmp_path / "packed.arrow")}]


@pytest.mark.parametrize("failing", range(BATCHES))
def test_a_batch_that_cannot_be_written_is_the_error_and_leaves_no_file(
    rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The first, one in the middle, the last: a write runs behind the gathering of the next batch, and each is awaited."""
    on_a_disk(monkeypatch, failing)
    with pytest.raises(OSError, match="No space left"):
        pack_dataset(rows, 8, cache_file=tmp_path / "packed.arrow")
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
