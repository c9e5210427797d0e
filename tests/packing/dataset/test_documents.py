"""Packed datasets: every document once, whole and unchanged, with its boundaries."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_plugins.errors import PackingError
from sft_plugins.packing import dataset as module
from sft_plugins.packing import report as report_module
from sft_plugins.packing.dataset import pack_dataset
from sft_plugins.packing.plan import plan_packs
from testkit.documents import as_documents, documents_of, halves


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_documents_in_are_documents_out_whatever_the_storage(data: st.DataObject) -> None:
    """P8: slices, index mappings, several chunks, list and large_list, int32 and int64 lose and duplicate nothing."""
    rows = halves(*data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=40)))
    kind = data.draw(st.sampled_from(["int32", "int64"]))
    holder = data.draw(st.sampled_from([List, LargeList]))
    features = Features({"input_ids": holder(Value(kind)), "labels": holder(Value("int64"))})
    cut = data.draw(st.integers(0, len(rows)))
    parts = [Dataset.from_list(part, features=features) for part in (rows[:cut], rows[cut:]) if part]
    dataset = concatenate_datasets(parts)
    for step in data.draw(st.lists(st.sampled_from(["shuffle", "select", "slice", "repeat"]), max_size=3)):
        count = len(rows)
        if step == "shuffle":
            order = np.random.default_rng(data.draw(st.integers(0, 9))).permutation(count).tolist()
        elif step == "slice":
            order = list(range(data.draw(st.integers(0, count - 1)), count))
        elif step == "select":
            order = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
        else:
            order = [0, *range(count)]
        dataset, rows = dataset.select(order), [rows[i] for i in order]
    capacity = data.draw(st.integers(9, 40))

    packed, report = pack_dataset(dataset, capacity, seed=data.draw(st.integers(0, 3)))

    assert documents_of(packed) == as_documents(rows)
    assert all(len(row["input_ids"]) <= capacity for row in packed)
    assert (report.documents, report.rows, report.lost) == (len(rows), len(packed), {})
    assert packed.features["input_ids"] == List(Value(kind))


def test_rows_are_the_packs_of_the_plan_in_its_order() -> None:
    rows = halves(4, 7, 2, 5, 5, 3, 9)
    packed, _ = pack_dataset(Dataset.from_list(rows), 10, seed=3)
    plan = plan_packs([4, 7, 2, 5, 5, 3, 9], 10, seed=3)
    for row, pack in zip(packed, plan, strict=True):
        assert row["input_ids"] == [token for i in pack for token in rows[i]["input_ids"]]
        assert row["labels"] == [label for i in pack for label in rows[i]["labels"]]
        assert row["seq_lengths"] == [len(rows[i]["input_ids"]) for i in pack]


def test_the_packed_row_has_exactly_these_columns() -> None:
    packed, _ = pack_dataset(Dataset.from_list(halves(4, 3)), 8)
    assert packed[:] == {
        "input_ids": [[1, 2, 3, 4, 1001, 1002, 1003]],
        "labels": [[-100, -100, 3, 4, -100, 1002, 1003]],
        "seq_lengths": [[4, 3]],
    }
    assert packed.features["seq_lengths"] == List(Value("int32"))


def test_many_batches_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list(halves(*range(2, 40)))
    whole, _ = pack_dataset(rows, 50, seed=1)
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    assert pack_dataset(rows, 50, seed=1).dataset[:] == whole[:]
    assert len(pack_dataset(rows, 50, seed=1).dataset.data.column("labels").chunks) == len(whole)


def test_fixed_size_lists_and_formatted_datasets_are_read_as_they_are() -> None:
    rows = halves(3, 3, 3, 3)
    features = Features({"input_ids": List(Value("int32"), length=3), "labels": List(Value("int32"), length=3)})
    dataset = Dataset.from_list(rows, features=features).with_format("torch")
    assert documents_of(pack_dataset(dataset.select([3, 1, 2]), 7).dataset) == as_documents(
        [rows[i] for i in (1, 2, 3)]
    )
    assert documents_of(pack_dataset(dataset.skip(1), 7).dataset) == as_documents(rows[1:])


def test_a_null_outside_the_selected_rows_does_no_harm() -> None:
    rows = [*halves(3, 4), {"input_ids": [1, None], "labels": [-100, 2]}, {"input_ids": None, "labels": None}]
    dataset = Dataset.from_list(rows)
    assert documents_of(pack_dataset(dataset.select([1, 0]), 9).dataset) == as_documents(rows[:2])


def test_every_process_packs_the_same_rows() -> None:
    """P14, as far as data goes: ranks that pack for themselves agree, and no row is dropped to make them agree."""
    dataset = Dataset.from_list(halves(*np.random.default_rng(0).integers(2, 30, 200).tolist()))
    one, two = pack_dataset(dataset, 64, seed=5), pack_dataset(dataset, 64, seed=5)
    assert one.dataset[:] == two.dataset[:]
    assert one.dataset._fingerprint == two.dataset._fingerprint
    assert one.report == two.report
    assert one.report.documents == len(dataset)


def test_another_seed_packs_an_epoch_anew_in_as_many_rows() -> None:
    dataset = Dataset.from_list(halves(*np.random.default_rng(0).integers(2, 8, 300).tolist()))
    one, two = pack_dataset(dataset, 64, seed=0), pack_dataset(dataset, 64, seed=1)
    assert one.dataset[:] != two.dataset[:]
    assert one.dataset._fingerprint != two.dataset._fingerprint
    assert documents_of(one.dataset) == documents_of(two.dataset)
    assert one.report == two.report


# ---- Boundaries survive ----


def test_boundaries_survive_what_is_done_to_datasets(tmp_path: Path) -> None:
    """P10: select, shuffle, saving, sharding and streaming keep `seq_lengths` with its row."""
    packed, _ = pack_dataset(Dataset.from_list(halves(4, 7, 2, 5, 5, 3, 9)), 10)
    packed.save_to_disk(tmp_path / "packed")
    expected = documents_of(packed)
    assert documents_of(load_from_disk(tmp_path / "packed")) == expected
    assert documents_of(packed.shuffle(seed=0)) == expected
    assert sorted(documents_of(packed.shard(2, 0)) + documents_of(packed.shard(2, 1))) == expected
    assert documents_of(packed.to_iterable_dataset(num_shards=2)) == expected


def test_trl_counts_the_boundaries_among_the_columns_it_keeps() -> None:
    """P10: `remove_unused_columns=True` in TRL leaves `seq_lengths`; the collator refuses rows that lost it."""
    trl = pytest.importorskip("trl")

    class Probe(trl.SFTTrainer):
        def __init__(self) -> None:
            self._signature_columns, self._is_vision_dataset, self._is_vlm = None, False, False

    probe = Probe()
    probe._set_signature_columns_if_needed()
    packed, _ = pack_dataset(Dataset.from_list(halves(4, 3)), 8)
    assert set(packed.column_names) <= set(probe._signature_columns)


def test_packed_rows_are_not_packed_again() -> None:
    """P10: rows with boundaries never pass for single documents."""
    packed, _ = pack_dataset(Dataset.from_list(halves(4, 3)), 8)
    with pytest.raises(PackingError, match="packed already") as error:
        pack_dataset(packed, 16)
    assert error.value.code == "already_packed"


# ---- Volume ----


def test_rows_are_within_two_thousandths_of_the_volume_bound() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 0.9, 20_000), 8, 4096).astype(np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    ids = np.arange(offsets[-1], dtype=np.int32)
    labels = ids.copy()
    labels[offsets[:-1]] = -100
    columns = {"input_ids": pa.ListArray.from_arrays(offsets, ids), "labels": pa.ListArray.from_arrays(offsets, labels)}
    packed, report = pack_dataset(Dataset(pa.table(columns)), 4096)
    assert report.rows_above_bound <= 0.002 * report.lower_bound
    tokens = np.concatenate([chunk.flatten().to_numpy() for chunk in packed.data.column("input_ids").chunks])
    assert np.array_equal(np.bincount(tokens), np.ones(len(ids)))


def test_the_worked_examples_hold() -> None:
    for checked in (module, report_module):
        result = doctest.testmod(checked)
        assert result.failed == 0
        assert result.attempted > 0
