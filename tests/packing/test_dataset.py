"""Packed datasets: every document once, whole and unchanged, or counted as lost by a policy that was asked for."""

from __future__ import annotations

import doctest
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, LargeList, List, Value, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from sft_plugins.errors import PackingError
from sft_plugins.packing import arrow
from sft_plugins.packing import dataset as module
from sft_plugins.packing import report as report_module
from sft_plugins.packing.dataset import pack_dataset
from sft_plugins.packing.plan import plan_packs
from sft_plugins.packing.report import Loss, PackReport, expected_padding

Row = dict[str, list[int]]


def document(length: int, number: int = 0, prompt: int | None = None) -> Row:
    """`length` tokens that no other document has; the first `prompt` of them (half, by default) without loss."""
    ids = [number * 1000 + i for i in range(1, length + 1)]
    prompt = max(1, length // 2) if prompt is None else prompt
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def corpus(*lengths: int) -> list[Row]:
    return [document(length, number) for number, length in enumerate(lengths)]


def documents_of(packed: Dataset) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut the packed rows at their boundaries again; sorted, so that two multisets can be compared."""
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"])
        at = 0
        for length in row["seq_lengths"]:
            found.append((tuple(row["input_ids"][at : at + length]), tuple(row["labels"][at : at + length])))
            at += length
    return sorted(found)


def as_documents(rows: list[Row]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_documents_in_are_documents_out_whatever_the_storage(data: st.DataObject) -> None:
    """P8: slices, index mappings, several chunks, list and large_list, int32 and int64 lose and duplicate nothing."""
    rows = corpus(*data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=40)))
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
    rows = corpus(4, 7, 2, 5, 5, 3, 9)
    packed, _ = pack_dataset(Dataset.from_list(rows), 10, seed=3)
    plan = plan_packs([4, 7, 2, 5, 5, 3, 9], 10, seed=3)
    for row, pack in zip(packed, plan, strict=True):
        assert row["input_ids"] == [token for i in pack for token in rows[i]["input_ids"]]
        assert row["labels"] == [label for i in pack for label in rows[i]["labels"]]
        assert row["seq_lengths"] == [len(rows[i]["input_ids"]) for i in pack]


def test_the_packed_row_has_exactly_these_columns() -> None:
    packed, _ = pack_dataset(Dataset.from_list(corpus(4, 3)), 8)
    assert packed[:] == {
        "input_ids": [[1, 2, 3, 4, 1001, 1002, 1003]],
        "labels": [[-100, -100, 3, 4, -100, 1002, 1003]],
        "seq_lengths": [[4, 3]],
    }
    assert packed.features["seq_lengths"] == List(Value("int32"))


def test_many_batches_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list(corpus(*range(2, 40)))
    whole, _ = pack_dataset(rows, 50, seed=1)
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    assert pack_dataset(rows, 50, seed=1).dataset[:] == whole[:]
    assert len(pack_dataset(rows, 50, seed=1).dataset.data.column("labels").chunks) == len(whole)


def test_fixed_size_lists_and_formatted_datasets_are_read_as_they_are() -> None:
    rows = corpus(3, 3, 3, 3)
    features = Features({"input_ids": List(Value("int32"), length=3), "labels": List(Value("int32"), length=3)})
    dataset = Dataset.from_list(rows, features=features).with_format("torch")
    assert documents_of(pack_dataset(dataset.select([3, 1, 2]), 7).dataset) == as_documents(
        [rows[i] for i in (1, 2, 3)]
    )
    assert documents_of(pack_dataset(dataset.skip(1), 7).dataset) == as_documents(rows[1:])


def test_a_null_outside_the_selected_rows_does_no_harm() -> None:
    rows = [*corpus(3, 4), {"input_ids": [1, None], "labels": [-100, 2]}, {"input_ids": None, "labels": None}]
    dataset = Dataset.from_list(rows)
    assert documents_of(pack_dataset(dataset.select([1, 0]), 9).dataset) == as_documents(rows[:2])


def test_every_process_packs_the_same_rows() -> None:
    """P14, as far as data goes: ranks that pack for themselves agree, and no row is dropped to make them agree."""
    dataset = Dataset.from_list(corpus(*np.random.default_rng(0).integers(2, 30, 200).tolist()))
    one, two = pack_dataset(dataset, 64, seed=5), pack_dataset(dataset, 64, seed=5)
    assert one.dataset[:] == two.dataset[:]
    assert one.dataset._fingerprint == two.dataset._fingerprint
    assert one.report == two.report
    assert one.report.documents == len(dataset)


def test_another_seed_packs_an_epoch_anew_in_as_many_rows() -> None:
    dataset = Dataset.from_list(corpus(*np.random.default_rng(0).integers(2, 8, 300).tolist()))
    one, two = pack_dataset(dataset, 64, seed=0), pack_dataset(dataset, 64, seed=1)
    assert one.dataset[:] != two.dataset[:]
    assert one.dataset._fingerprint != two.dataset._fingerprint
    assert documents_of(one.dataset) == documents_of(two.dataset)
    assert one.report == two.report


# ---- Boundaries survive ----


def test_boundaries_survive_what_is_done_to_datasets(tmp_path: Path) -> None:
    """P10: select, shuffle, saving, sharding and streaming keep `seq_lengths` with its row."""
    packed, _ = pack_dataset(Dataset.from_list(corpus(4, 7, 2, 5, 5, 3, 9)), 10)
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
    packed, _ = pack_dataset(Dataset.from_list(corpus(4, 3)), 8)
    assert set(packed.column_names) <= set(probe._signature_columns)


def test_packed_rows_are_not_packed_again() -> None:
    """P10: rows with boundaries never pass for single documents."""
    packed, _ = pack_dataset(Dataset.from_list(corpus(4, 3)), 8)
    with pytest.raises(PackingError, match="packed already") as error:
        pack_dataset(packed, 16)
    assert error.value.code == "already_packed"


# ---- Policies, each loss counted ----


def test_overflow_stops_by_default_and_names_the_row() -> None:
    """P9: nothing is cut unless that was asked for."""
    with pytest.raises(PackingError, match=r"row 1.*12 tokens and a packed row holds 8 \(2 such rows\)") as error:
        pack_dataset(Dataset.from_list(corpus(3, 12, 9)), 8)
    assert (error.value.code, error.value.row) == ("overflow", 1)


def test_overflow_dropped_is_counted() -> None:
    rows = corpus(3, 12, 9, 4)
    packed, report = pack_dataset(Dataset.from_list(rows), 8, overflow="drop")
    assert documents_of(packed) == as_documents([rows[0], rows[3]])
    assert report.lost == {"overflow": Loss(rows=2, tokens=21, supervised_tokens=6 + 5, first_rows=(1, 2))}
    assert (report.rows_in, report.tokens_in, report.documents, report.tokens, report.dropped) == (4, 28, 2, 7, 2)


def test_overflow_truncated_keeps_the_prompt_and_packs_no_rest() -> None:
    """P9: the end is cut off and counted; it never comes back as a document without a prompt."""
    rows = [document(3, 0), document(12, 1, prompt=5), document(9, 2)]
    packed, report = pack_dataset(Dataset.from_list(rows), 8, overflow="truncate")
    cut = [{name: values[:8] for name, values in row.items()} for row in rows]
    assert documents_of(packed) == as_documents(cut)
    assert report.lost == {"truncated": Loss(rows=2, tokens=5, supervised_tokens=5, first_rows=(1, 2))}
    assert (report.documents, report.tokens, report.dropped, report.longest) == (3, 19, 0, 8)


def test_a_cut_document_gets_no_false_stop() -> None:
    """M22: what stands at the cut is the document's own token with its own label."""
    packed, _ = pack_dataset(Dataset.from_list([document(12)]), 8, overflow="truncate")
    assert packed[0]["input_ids"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert packed[0]["labels"] == [-100] * 6 + [7, 8]


def test_a_document_cut_to_its_prompt_is_dropped_and_counted() -> None:
    """M13: no row that trains nothing comes out of truncation."""
    rows = [document(3, 0), document(12, 1, prompt=10)]
    packed, report = pack_dataset(Dataset.from_list(rows), 8, overflow="truncate")
    assert documents_of(packed) == as_documents(rows[:1])
    assert report.lost == {"truncated_to_prompt": Loss(rows=1, tokens=12, supervised_tokens=2, first_rows=(1,))}
    assert report.dropped == 1


def test_documents_without_loss_stop_by_default_or_are_dropped_and_counted() -> None:
    """M13."""
    rows = [document(3, 0), document(5, 1, prompt=5), document(4, 2), document(9, 3, prompt=9)]
    with pytest.raises(PackingError, match=r"every label is -100 \(2 such rows\)") as error:
        pack_dataset(Dataset.from_list(rows), 8)
    assert (error.value.code, error.value.row) == ("no_supervised_tokens", 1)
    packed, report = pack_dataset(Dataset.from_list(rows), 8, unsupervised="drop")
    assert documents_of(packed) == as_documents([rows[0], rows[2]])
    assert report.lost == {"no_supervised_tokens": Loss(rows=2, tokens=14, supervised_tokens=0, first_rows=(1, 3))}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=30),
    st.integers(1, 12),
    st.sampled_from(["drop", "truncate"]),
)
def test_no_token_leaves_uncounted(shapes: list[tuple[int, int]], capacity: int, overflow: str) -> None:
    """P8, P9: what the policies leave, worked out row by row, is what is packed; the rest is in the report."""
    rows = [document(length, number, min(prompt, length)) for number, (length, prompt) in enumerate(shapes)]
    fitting = [row for row in rows if overflow == "truncate" or len(row["labels"]) <= capacity]
    cut = [{name: values[:capacity] for name, values in row.items()} for row in fitting]
    left = [row for row in cut if any(label != -100 for label in row["labels"])]
    options: dict[str, Any] = {"overflow": overflow, "unsupervised": "drop"}
    if not left:
        with pytest.raises(PackingError, match="no document is left"):
            pack_dataset(Dataset.from_list(rows), capacity, **options)
        return

    packed, report = pack_dataset(Dataset.from_list(rows), capacity, **options)

    assert documents_of(packed) == as_documents(left)
    supervised = [sum(label != -100 for row in part for label in row["labels"]) for part in (rows, left)]
    lost = report.lost.values()
    assert (report.rows_in, report.documents, report.rows_in - report.dropped) == (len(rows), len(left), len(left))
    assert report.tokens_in == sum(map(len, (row["labels"] for row in rows)))
    assert report.tokens == report.tokens_in - sum(loss.tokens for loss in lost) == sum(map(sum, packed["seq_lengths"]))
    assert report.supervised_tokens == supervised[0] - sum(loss.supervised_tokens for loss in lost) == supervised[1]


def test_the_first_label_of_every_document_carries_no_loss() -> None:
    """P7: a document whose first token would be predicted from the document before it is refused."""
    rows = [document(3, 0), {"input_ids": [7, 8], "labels": [7, 8]}, {"input_ids": [9, 8], "labels": [9, 8]}]
    with pytest.raises(PackingError, match=r"first label is not -100 \(2 such rows\)") as error:
        pack_dataset(Dataset.from_list(rows), 8)
    assert (error.value.code, error.value.row) == ("first_label", 1)


def test_further_columns_are_refused_dropped_or_carried() -> None:
    features = {"source": "tulu", "tags": ["a", "b"], "score": 0.5}
    rows = [row | features | {"source": f"s{i}"} for i, row in enumerate(corpus(3, 4, 5))]
    dataset = Dataset.from_list(rows).select([2, 0, 1])
    with pytest.raises(PackingError, match="columns source, tags, score") as error:
        pack_dataset(dataset, 8)
    assert error.value.code == "extra_columns"
    dropped, _ = pack_dataset(dataset, 8, extra_columns="drop")
    assert dropped.column_names == ["input_ids", "labels", "seq_lengths"]
    carried, _ = pack_dataset(dataset, 8, extra_columns="carry")
    by_length = {3: "s0", 4: "s1", 5: "s2"}
    for row in carried:
        assert row["source"] == [by_length[length] for length in row["seq_lengths"]]
        assert row["tags"] == [["a", "b"]] * len(row["seq_lengths"])
        assert row["score"] == [0.5] * len(row["seq_lengths"])


def test_padding_never_becomes_context() -> None:
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in corpus(3, 4)]
    assert len(pack_dataset(Dataset.from_list(rows), 8, extra_columns="drop").dataset) == 1
    rows[1]["attention_mask"][-1] = 0
    with pytest.raises(PackingError, match="the row is padded") as error:
        pack_dataset(Dataset.from_list(rows), 8, extra_columns="drop")
    assert (error.value.code, error.value.row) == ("padded_row", 1)


# ---- Bad input ----


@pytest.mark.parametrize(
    ("rows", "code", "row", "words"),
    [
        ([document(3), {"input_ids": [], "labels": []}], "empty_document", 1, "the document is empty"),
        ([{"input_ids": [], "labels": []}], "empty_document", 0, "the document is empty"),
        ([document(3), {"input_ids": [1, 2], "labels": [-100]}], "length_mismatch", 1, "2 input_ids and 1 labels"),
        ([document(3), {"input_ids": None, "labels": [-100]}], "bad_schema", 1, "'input_ids' holds a null"),
        ([document(3), {"input_ids": [1, None], "labels": [-100, 2]}], "bad_schema", 1, "'input_ids' holds a null"),
        ([document(3), {"input_ids": [1, 2], "labels": [-100, None]}], "bad_schema", 1, "'labels' holds a null"),
        ([{"input_ids": [1.0, 2.0], "labels": [-100, 2]}], "bad_schema", None, "list<.*double.*one list of integers"),
        ([{"input_ids": [1, 2], "labels": [True, False]}], "bad_schema", None, "bool"),
        ([{"input_ids": 1, "labels": -100}], "bad_schema", None, "type int"),
        ([{"input_ids": ["a"], "labels": [-100]}], "bad_schema", None, "string"),
        ([{"input_ids": [[1]], "labels": [-100]}], "bad_schema", None, "one list of integers"),
        ([{"input_ids": [1, 2]}], "bad_schema", None, "no 'labels'; found input_ids"),
        ([{"text": "a"}], "bad_schema", None, "no 'input_ids'; found text"),
        ([], "empty_dataset", None, "no rows"),
    ],
)
def test_bad_rows_are_refused(rows: list[Any], code: str, row: int | None, words: str) -> None:
    with pytest.raises(PackingError, match=words) as error:
        pack_dataset(Dataset.from_list(rows), 8)
    assert (error.value.code, error.value.row) == (code, row)


def test_a_transform_is_refused_since_rows_are_read_as_stored() -> None:
    dataset = Dataset.from_list([document(3)]).with_transform(lambda _: {"input_ids": [[7, 8]], "labels": [[-100, 8]]})
    with pytest.raises(PackingError, match="with_transform") as error:
        pack_dataset(dataset, 8)
    assert error.value.code == "bad_schema"


def test_row_numbers_are_those_of_the_dataset_as_it_was_given() -> None:
    dataset = Dataset.from_list([*corpus(3, 4, 5), {"input_ids": [1, 2], "labels": [-100]}]).select([2, 3, 0])
    with pytest.raises(PackingError) as error:
        pack_dataset(dataset, 8)
    assert error.value.row == 1


@pytest.mark.parametrize(
    ("given_dataset", "code", "remedy"),
    [
        (Dataset.from_list(corpus(3)).to_iterable_dataset(), "streaming_dataset", "pack_stream"),
        (DatasetDict(train=Dataset.from_list(corpus(3))), "bad_schema", "each split by itself"),
        (corpus(3), "bad_schema", "Dataset.from_list"),
    ],
)
def test_what_is_no_dataset_is_told_where_to_go(given_dataset: Any, code: str, remedy: str) -> None:
    with pytest.raises(PackingError, match=remedy) as error:
        pack_dataset(given_dataset, 8)
    assert error.value.code == code


@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ("overflow", "'raise', 'drop', 'truncate'"),
        ("unsupervised", "'raise', 'drop'"),
        ("extra_columns", "'raise', 'drop', 'carry'"),
    ],
)
def test_unknown_policies_raise_naming_the_known(option: str, allowed: str) -> None:
    with pytest.raises(PackingError, match=f"{option} is 'split'; expected one of {allowed}") as error:
        pack_dataset(Dataset.from_list(corpus(3)), 8, **{option: "split"})
    assert error.value.code == "bad_option"


@pytest.mark.parametrize("capacity", [0, -5, 4.5, None])
def test_a_bad_capacity_raises(capacity: Any) -> None:
    with pytest.raises(PackingError) as error:
        pack_dataset(Dataset.from_list(corpus(3)), capacity)
    assert error.value.code == "bad_capacity"


def test_a_dataset_of_which_nothing_is_left_raises() -> None:
    with pytest.raises(PackingError, match="no document is left to pack; dropped: overflow 2") as error:
        pack_dataset(Dataset.from_list(corpus(9, 10)), 8, overflow="drop")
    assert error.value.code == "empty_dataset"


# ---- Where the rows live ----


@pytest.fixture
def on_disk(tmp_path: Path) -> Dataset:
    Dataset.from_list(corpus(*range(2, 60))).save_to_disk(tmp_path / "rows")
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
    packed, _ = pack_dataset(Dataset.from_list(corpus(*range(2, 60))), 64)
    assert packed.cache_files == []


def test_a_failure_while_writing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module.TokenColumn, "gather", fail)
    with pytest.raises(OSError, match="disk full"):
        pack_dataset(Dataset.from_list(corpus(3, 4)), 8, cache_file=tmp_path / "packed.arrow")
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


# ---- The report ----


def report_of(*lengths: int, capacity: int = 10) -> PackReport:
    return pack_dataset(Dataset.from_list(corpus(*lengths)), capacity).report


def test_the_report_counts_rows_fill_and_bound() -> None:
    report = report_of(6, 6, 6, 4)
    assert (report.documents, report.rows, report.lower_bound, report.rows_above_bound) == (4, 3, 3, 0)
    assert (report.tokens, report.supervised_tokens, report.longest) == (22, 11, 6)
    assert (report.fill, report.supervised_share) == (22 / 30, 0.5)
    assert report.padded_to_max_length == 40


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from([1, 2, 4]))
def test_padding_cost_is_the_mean_over_all_orders(lengths: list[int], batch: int) -> None:
    def cost(order: tuple[int, ...]) -> int:
        batches = [order[i : i + batch] for i in range(0, len(order), batch)]
        return sum(len(part) * max(part) for part in batches)

    orders = [cost(order) for order in permutations(lengths)]
    values, counts = np.unique(lengths, return_counts=True)
    assert expected_padding(values, counts)[batch] == pytest.approx(sum(orders) / len(orders), abs=0.5001)


def test_the_report_says_what_changes_for_training() -> None:
    """Steps as transformers.Trainer counts them, worked by hand: 100 documents of 5 tokens, two to a row."""
    report = report_of(*[5] * 100)
    change = report.training(4, gradient_accumulation_steps=2, world_size=2)
    assert (change.rows_per_step, change.steps_before, change.steps_after) == (16, 7, 4)  # ⌈⌈100/8⌉/2⌉, ⌈⌈50/8⌉/2⌉
    assert (change.documents_per_step_before, change.documents_per_step_after) == (16, 32)
    assert (change.tokens_per_step_before, change.tokens_per_step_after) == (80, 160)
    assert change.rows_per_step_for_same_documents == 8
    assert "one epoch goes from 7 to 4 steps, each with 16 → 32 documents and 80 → 160 tokens" in str(change)
    assert "take 8 packed rows per step" in str(change)


def test_steps_are_those_of_the_trainer(tmp_path: Path) -> None:
    class Model(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": super().forward(x[:, None]).mean()}

    change = report_of(*[5] * 101).training(4, gradient_accumulation_steps=3)
    for rows, steps in ((101, change.steps_before), (51, change.steps_after)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=3,
            num_train_epochs=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(Model(1, 1), arguments, train_dataset=[{"x": 0.0}] * rows)
        trainer.train()
        assert trainer.state.global_step == steps


def test_the_report_is_plain_data() -> None:
    rows = [*corpus(3, 4, 12), document(11, 3, prompt=10)]
    _, report = pack_dataset(Dataset.from_list(rows), 8, overflow="truncate")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["lost"]["truncated"] == {"rows": 1, "tokens": 4, "supervised_tokens": 4, "first_rows": [2]}
    assert data["lost"]["truncated_to_prompt"]["rows"] == 1
    assert (data["documents"], data["rows"], data["lower_bound"], data["fill"]) == (3, 2, 2, 15 / 16)


def test_the_printed_report_names_every_loss_and_the_change_for_training() -> None:
    rows = [*corpus(3, 4, 12), document(11, 3, prompt=10), document(2, 4, prompt=2)]
    _, report = pack_dataset(Dataset.from_list(rows), 8, overflow="truncate", unsupervised="drop")
    text = str(report)
    for words in (
        "documents",
        "lower bound",
        "fill",
        "93.75%",
        "truncated",
        "cut at the end",
        "rows per optimizer step",
    ):
        assert words in text
    assert set(report.lost) == {"truncated", "truncated_to_prompt", "no_supervised_tokens"} < set(report_module.LOSSES)


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
