"""Where packed rows live: files that are mapped, whole or absent, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk

from sft_plugins.packing import arrow
from sft_plugins.packing import dataset as module
from sft_plugins.packing.dataset import pack_dataset
from testkit.documents import halves

# ---- Where the rows live ----


@pytest.fixture
def on_disk(tmp_path: Path) -> Dataset:
    Dataset.from_list(halves(*range(2, 60))).save_to_disk(tmp_path / "rows")
    return load_from_disk(tmp_path / "rows")


def test_a_file_is_mapped_and_holds_what_memory_would(on_disk: Dataset, tmp_path: Path) -> None:
    in_memory, report = pack_dataset(on_disk, 64)
    mapped, same = pack_dataset(on_disk, 64, cache_file=tmp_path / "packed.arrow")
    assert in_memory.cache_files == []
    assert [file["filename"] for file in mapped.cache_files] == [str(tmp_path / "packed.arrow")]
    assert mapped[:] == in_memory[:]
    assert mapped.features == in_memory.features
    assert mapped._fingerprint == in_memory._fingerprint
    assert report == same


def test_large_results_go_beside_the_files_of_the_dataset_and_are_cleaned_up_with_them(
    on_disk: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pack_dataset(on_disk, 64).dataset[:]
    monkeypatch.setattr(arrow, "IN_MEMORY_BYTES", 100)
    packed, _ = pack_dataset(on_disk, 64)
    again, _ = pack_dataset(on_disk, 64)  # over a file that is mapped
    assert packed[:] == again[:] == expected
    (file,) = {file["filename"] for dataset in (packed, again) for file in dataset.cache_files}
    assert Path(file).parent == tmp_path / "rows"
    assert on_disk.cleanup_cache_files() == 1
    assert sorted(path.suffix for path in (tmp_path / "rows").iterdir()) == [".arrow", ".json", ".json"]


def test_datasets_in_memory_write_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow, "IN_MEMORY_BYTES", 100)
    packed, _ = pack_dataset(Dataset.from_list(halves(*range(2, 60))), 64)
    assert packed.cache_files == []


def test_a_failure_while_writing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module.TokenColumn, "gather", fail)
    with pytest.raises(OSError, match="disk full"):
        pack_dataset(Dataset.from_list(halves(3, 4)), 8, cache_file=tmp_path / "packed.arrow")
    assert list(tmp_path.iterdir()) == []


def test_memory_beyond_data_and_result_is_one_batch(
    on_disk: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more tokens are gathered at a time than `BATCH_TOKENS` and one row."""
    gathered = []
    gather = module.TokenColumn.gather

    def watch(self: Any, documents: Any, lengths: Any) -> Any:
        gathered.append(int(lengths.sum()))
        return gather(self, documents, lengths)

    monkeypatch.setattr(module.TokenColumn, "gather", watch)
    monkeypatch.setattr(module, "BATCH_TOKENS", 200)
    pack_dataset(on_disk, 64, cache_file=tmp_path / "packed.arrow")
    assert max(gathered) <= 200
    assert len(gathered) > 10
