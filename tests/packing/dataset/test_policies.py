"""Packed datasets: what is lost is lost by a policy that was asked for, and counted; what cannot be packed is refused."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_plugins.errors import PackingError
from sft_plugins.packing.dataset import pack_dataset
from sft_plugins.packing.report import Loss
from testkit.documents import as_documents, document, documents_of, halved, halves

# ---- Policies, each loss counted ----


def test_overflow_stops_by_default_and_names_the_row() -> None:
    """P9: nothing is cut unless that was asked for."""
    with pytest.raises(PackingError, match=r"row 1.*12 tokens and a packed row holds 8 \(2 such rows\)") as error:
        pack_dataset(Dataset.from_list(halves(3, 12, 9)), 8)
    assert (error.value.code, error.value.row) == ("overflow", 1)


def test_overflow_dropped_is_counted() -> None:
    rows = halves(3, 12, 9, 4)
    packed, report = pack_dataset(Dataset.from_list(rows), 8, overflow="drop")
    assert documents_of(packed) == as_documents([rows[0], rows[3]])
    assert report.lost == {"overflow": Loss(rows=2, tokens=21, supervised_tokens=6 + 5, first_rows=(1, 2))}
    assert (report.rows_in, report.tokens_in, report.documents, report.tokens, report.dropped) == (4, 28, 2, 7, 2)


def test_overflow_truncated_keeps_the_prompt_and_packs_no_rest() -> None:
    """P9: the end is cut off and counted; it never comes back as a document without a prompt."""
    rows = [halved(3, 0), document(12, 1, prompt=5), halved(9, 2)]
    packed, report = pack_dataset(Dataset.from_list(rows), 8, overflow="truncate")
    cut = [{name: values[:8] for name, values in row.items()} for row in rows]
    assert documents_of(packed) == as_documents(cut)
    assert report.lost == {"truncated": Loss(rows=2, tokens=5, supervised_tokens=5, first_rows=(1, 2))}
    assert (report.documents, report.tokens, report.dropped, report.longest) == (3, 19, 0, 8)


def test_a_cut_document_gets_no_false_stop() -> None:
    """M22: what stands at the cut is the document's own token with its own label."""
    packed, _ = pack_dataset(Dataset.from_list([halved(12)]), 8, overflow="truncate")
    assert packed[0]["input_ids"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert packed[0]["labels"] == [-100] * 6 + [7, 8]


def test_a_document_cut_to_its_prompt_is_dropped_and_counted() -> None:
    """M13: no row that trains nothing comes out of truncation."""
    rows = [halved(3, 0), document(12, 1, prompt=10)]
    packed, report = pack_dataset(Dataset.from_list(rows), 8, overflow="truncate")
    assert documents_of(packed) == as_documents(rows[:1])
    assert report.lost == {"truncated_to_prompt": Loss(rows=1, tokens=12, supervised_tokens=2, first_rows=(1,))}
    assert report.dropped == 1


def test_documents_without_loss_stop_by_default_or_are_dropped_and_counted() -> None:
    """M13."""
    rows = [halved(3, 0), document(5, 1, prompt=5), halved(4, 2), document(9, 3, prompt=9)]
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
    rows = [halved(3, 0), {"input_ids": [7, 8], "labels": [7, 8]}, {"input_ids": [9, 8], "labels": [9, 8]}]
    with pytest.raises(PackingError, match=r"first label is not -100 \(2 such rows\)") as error:
        pack_dataset(Dataset.from_list(rows), 8)
    assert (error.value.code, error.value.row) == ("first_label", 1)


def test_further_columns_are_refused_dropped_or_carried() -> None:
    features = {"source": "tulu", "tags": ["a", "b"], "score": 0.5}
    rows = [row | features | {"source": f"s{i}"} for i, row in enumerate(halves(3, 4, 5))]
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
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in halves(3, 4)]
    assert len(pack_dataset(Dataset.from_list(rows), 8, extra_columns="drop").dataset) == 1
    rows[1]["attention_mask"][-1] = 0
    with pytest.raises(PackingError, match="the row is padded") as error:
        pack_dataset(Dataset.from_list(rows), 8, extra_columns="drop")
    assert (error.value.code, error.value.row) == ("padded_row", 1)


# ---- Bad input ----


@pytest.mark.parametrize(
    ("rows", "code", "row", "words"),
    [
        ([halved(3), {"input_ids": [], "labels": []}], "empty_document", 1, "the document is empty"),
        ([{"input_ids": [], "labels": []}], "empty_document", 0, "the document is empty"),
        ([halved(3), {"input_ids": [1, 2], "labels": [-100]}], "length_mismatch", 1, "2 input_ids and 1 labels"),
        ([halved(3), {"input_ids": None, "labels": [-100]}], "bad_schema", 1, "'input_ids' holds a null"),
        ([halved(3), {"input_ids": [1, None], "labels": [-100, 2]}], "bad_schema", 1, "'input_ids' holds a null"),
        ([halved(3), {"input_ids": [1, 2], "labels": [-100, None]}], "bad_schema", 1, "'labels' holds a null"),
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
    dataset = Dataset.from_list([halved(3)]).with_transform(lambda _: {"input_ids": [[7, 8]], "labels": [[-100, 8]]})
    with pytest.raises(PackingError, match="with_transform") as error:
        pack_dataset(dataset, 8)
    assert error.value.code == "bad_schema"


def test_row_numbers_are_those_of_the_dataset_as_it_was_given() -> None:
    dataset = Dataset.from_list([*halves(3, 4, 5), {"input_ids": [1, 2], "labels": [-100]}]).select([2, 3, 0])
    with pytest.raises(PackingError) as error:
        pack_dataset(dataset, 8)
    assert error.value.row == 1


@pytest.mark.parametrize(
    ("given_dataset", "code", "remedy"),
    [
        (Dataset.from_list(halves(3)).to_iterable_dataset(), "streaming_dataset", "pack_stream"),
        (DatasetDict(train=Dataset.from_list(halves(3))), "bad_schema", "each split by itself"),
        (halves(3), "bad_schema", "Dataset.from_list"),
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
        pack_dataset(Dataset.from_list(halves(3)), 8, **{option: "split"})
    assert error.value.code == "bad_option"


@pytest.mark.parametrize("capacity", [0, -5, 4.5, None])
def test_a_bad_capacity_raises(capacity: Any) -> None:
    with pytest.raises(PackingError) as error:
        pack_dataset(Dataset.from_list(halves(3)), capacity)
    assert error.value.code == "bad_capacity"


def test_a_dataset_of_which_nothing_is_left_raises() -> None:
    with pytest.raises(PackingError, match="no document is left to pack; dropped: overflow 2") as error:
        pack_dataset(Dataset.from_list(halves(9, 10)), 8, overflow="drop")
    assert error.value.code == "empty_dataset"
