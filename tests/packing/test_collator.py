"""`BlockDiagonalPackingCollator`: exact keys, exact values, and nothing read that was not said."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sft_plugins.errors import ContaminationError, PackingError
from sft_plugins.packing.collator import BlockDiagonalPackingCollator
from sft_plugins.packing.dataset import pack_dataset
from sft_plugins.packing.isolation.apply import check_isolation, isolate
from testkit.tiny_models import build

TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=2)
KEYS = {"input_ids", "labels", "position_ids", "seq_idx"}
KEYS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
MODEL = build("llama").model


def collator(**options: Any) -> BlockDiagonalPackingCollator:
    return BlockDiagonalPackingCollator(TOKENIZER, model=MODEL, **options)


def row(ids: list[int], labels: list[int] | None = None, lengths: list[int] | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"input_ids": ids, "labels": list(ids) if labels is None else labels}
    return made if lengths is None else {**made, "seq_lengths": lengths}


ROWS = [row([5, 6, 2, 7, 2], [5, 6, 2, 7, 2], [3, 2]), row([8, 9, 2], [-100, 9, 2], [3])]


def test_the_golden_batch() -> None:
    batch = collator()(ROWS)
    assert set(batch) == KEYS
    expected = {
        "input_ids": torch.tensor([[5, 6, 2, 7, 2, 8, 9, 2]]),
        "labels": torch.tensor([[-100, 6, 2, -100, 2, -100, 9, 2]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 5, 8], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 3, 5, 8], dtype=torch.int32),
        "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]], dtype=torch.int32),
    }
    for key, value in expected.items():
        assert batch[key].dtype == value.dtype
        assert torch.equal(batch[key], value), key
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert type(batch["max_length_q"]) is int


def test_padding_is_a_document_of_its_own() -> None:
    batch = collator(pad_to_multiple_of=16)(ROWS)
    assert batch["input_ids"].shape == (1, 16)
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 16]
    assert batch["labels"][0, 8:].tolist() == [-100] * 8
    assert batch["input_ids"][0, 8:].tolist() == [0] * 8
    assert batch["position_ids"][0, 8:].tolist() == list(range(8))
    assert collator(pad_to_multiple_of=8)(ROWS)["cu_seq_lens_q"].tolist() == [0, 3, 5, 8]


def test_padding_leaves_the_documents_as_they_are() -> None:
    plain, padded = collator()(ROWS), collator(pad_to_multiple_of=16)(ROWS)
    with torch.no_grad():
        torch.testing.assert_close(MODEL(**padded).logits[:, :8], MODEL(**plain).logits)
        torch.testing.assert_close(MODEL(**padded).loss, MODEL(**plain).loss)


def test_branches_of_several_rows_hang_on_documents_of_their_own_row() -> None:
    """Two documents under the first, then a document without branches, then the same tree again."""
    tree = {**row([5, 6, 2, 2, 7, 2, 8]), "seq_lengths": [3, 4, 4], "seq_depths": [0, 2, 2], "seq_parents": [-1, 0, 0]}
    batch = collator()([tree, ROWS[1], tree])
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 7, 10, 13, 15, 17]
    assert batch["seq_parents"].tolist() == [-1, 0, 0, -1, -1, 4, 4]
    assert batch["seq_depths"].tolist() == [0, 2, 2, 0, 0, 2, 2]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3, 2, 3, 0, 1, 2, 0, 1, 2, 2, 3, 2, 3]]


def test_single_documents_are_flattened() -> None:
    batch = collator(rows="documents")([row([5, 6, 7]), row([8, 9])])
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, lambda v: np.array(v, dtype=np.int32)])
def test_rows_come_as_lists_arrays_or_tensors_and_stay_as_they_are(convert: Any) -> None:
    given = [{key: convert(value) for key, value in one.items()} for one in ROWS]
    batch = collator()(given)
    assert all(torch.equal(torch.as_tensor(batch[k]), torch.as_tensor(v)) for k, v in collator()(ROWS).items())
    assert [list(map(int, one["labels"])) for one in given] == [one["labels"] for one in ROWS]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=5), st.integers(1, 9))
def test_every_document_goes_in_and_comes_out_once(rows: list[list[int]], multiple: int) -> None:
    """P8: tokens out are tokens in, in order, each in its own document."""
    made, number, documents = [], 4, []
    for lengths in rows:
        ids: list[int] = []
        for length in lengths:
            documents.append([4 + (number + i) % 90 for i in range(length)])
            ids += documents[-1]
            number += length
        made.append(row(ids, None, lengths))
    if max(map(len, documents)) == 1:
        with pytest.raises(PackingError, match="carries loss"):
            PROPERTY(made)
        return
    PROPERTY.pad_to_multiple_of = multiple
    batch = PROPERTY(made)
    ends = batch["cu_seq_lens_q"].tolist()
    out = [batch["input_ids"][0, a:b].tolist() for a, b in itertools.pairwise(ends)]
    assert out[: len(documents)] == documents
    assert len(out) - len(documents) in (0, 1)
    assert batch["input_ids"].shape[1] % multiple == 0
    assert set(batch["labels"][0, ends[:-1]].tolist()) == {-100}


PROPERTY = collator(pad_to_multiple_of=1)


@pytest.mark.parametrize(
    ("rows", "given", "code", "says"),
    [
        ("packed", row([5, 6]), "bad_schema", "no `seq_lengths`.*remove_unused_columns"),
        ("documents", row([5, 6], None, [2]), "already_packed", "rows='packed'"),
        ("packed", {"input_ids": [5], "seq_lengths": [1]}, "bad_schema", "no labels; found input_ids, seq_lengths"),
        ("packed", {}, "bad_schema", "no input_ids and no labels; found nothing"),
        ("packed", [5, 6], "bad_schema", "mapping"),
        ("packed", row([5, 6, 7], None, [1, 1]), "boundaries", "do not fill a row of 3"),
        ("packed", row([5, 6, 7], None, [3, 0]), "boundaries", "positive lengths"),
        ("packed", row([5, 6, 7], None, [4, -1]), "boundaries", "positive lengths"),
        ("packed", row([], None, []), "boundaries", "do not fill a row of 0"),
        ("documents", row([]), "boundaries", "do not fill a row of 0"),
        ("packed", row([5, 6, 7], [5, 6], [3]), "length_mismatch", "3 input_ids and 2 labels"),
        ("packed", row([5, 96, 7], None, [3]), "id_out_of_range", r"input_ids.1. = 96 is not in the vocabulary .0, 96"),
        ("packed", row([5, -1, 7], None, [3]), "id_out_of_range", r"input_ids.1. = -1"),
        (
            "packed",
            row([5, 6, 7], [6, 7, -100], [3]),
            "label_mismatch",
            r"labels.1. = 7, but input_ids.1. = 6.*do not shift",
        ),
        ("packed", row([5, 6, 7], [5, -1, 7], [3]), "label_mismatch", r"labels.1. = -1"),
        ("packed", {"input_ids": [[5, 6]], "labels": [[5, 6]], "seq_lengths": [2]}, "bad_schema", "flat list"),
        ("packed", {"input_ids": [5.0], "labels": [5], "seq_lengths": [1]}, "bad_schema", "float64"),
        ("documents", {**row([5, 6]), "attention_mask": [1, 0]}, "bad_schema", "attention_mask"),
        ("documents", {**row([5, 6]), "attention_mask": [1, 2]}, "bad_schema", "attention_mask"),
    ],
)
def test_bad_rows_are_refused_and_named(rows: str, given: Any, code: str, says: str) -> None:
    good = row([5, 6], None, [2]) if rows == "packed" else row([5, 6])
    with pytest.raises(PackingError, match=says) as caught:
        collator(rows=rows)([good, given])
    assert (caught.value.code, caught.value.row) == (code, 1)


def test_a_batch_without_loss_is_refused() -> None:
    with pytest.raises(PackingError, match="none of the batch's 3 tokens") as caught:
        collator(rows="documents")([row([5, 6, 7], [-100] * 3)])
    assert caught.value.code == "no_supervised_tokens"
    with pytest.raises(PackingError, match="no rows"):
        collator()([])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": "single"}, "'packed', 'documents'"),
        ({"pad_to_multiple_of": 0}, "an integer from 1 on"),
        ({"pad_to_multiple_of": 8.0}, "an integer from 1 on"),
    ],
)
def test_options_are_checked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(PackingError, match=says) as caught:
        collator(**options)
    assert caught.value.code == "bad_option"


@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
def test_attention_masks_that_packing_carried_along_are_read(kind: str | None) -> None:
    """`extra_columns="carry"` keeps one mask per document, of unequal lengths."""
    documents = [{**row(ids, [-100, *ids[1:]]), "attention_mask": [1] * len(ids)} for ids in ([5, 6, 7], [8, 9])]
    packed = pack_dataset(Dataset.from_list(documents), 8, extra_columns="carry").dataset.with_format(kind)
    assert torch.equal(collator()([packed[0]])["cu_seq_lens_q"], torch.tensor([0, 3, 5], dtype=torch.int32))
    hidden = {**packed.with_format(None)[0], "attention_mask": [[1, 1, 1], [1, 0]]}
    with pytest.raises(PackingError, match="attention_mask hides"):
        collator()([hidden])


def test_something_that_is_no_tokenizer_is_refused() -> None:
    for thing in (None, "gpt2", SimpleNamespace(tokenizer=TOKENIZER)):
        with pytest.raises(PackingError, match="expected a transformers tokenizer") as caught:
            BlockDiagonalPackingCollator(thing, model=MODEL)
        assert caught.value.code == "bad_option"


def test_padding_needs_a_token() -> None:
    bare = SimpleNamespace(pad_token_id=None, eos_token_id=None)
    with pytest.raises(PackingError, match="neither a pad nor an EOS token"):
        BlockDiagonalPackingCollator(bare, model=MODEL, pad_to_multiple_of=8)
    assert BlockDiagonalPackingCollator(bare, model=MODEL)(ROWS)["input_ids"].shape == (1, 8)
    eos = BlockDiagonalPackingCollator(
        SimpleNamespace(pad_token_id=None, eos_token_id=2), model=MODEL, pad_to_multiple_of=9
    )
    assert eos(ROWS)["input_ids"][0, -1] == 2


def test_constructing_it_isolates_and_proves_the_model() -> None:
    model = build("gpt_oss").model
    made = BlockDiagonalPackingCollator(TOKENIZER, model=model)
    assert made.isolation.backend == "varlen"
    assert check_isolation(model).leaked == 0


def test_a_backend_that_was_chosen_before_is_kept() -> None:
    model = build("llama").model
    isolate(model, backend="unpack")
    assert BlockDiagonalPackingCollator(TOKENIZER, model=model).isolation.backend == "unpack"


def test_a_model_that_cannot_be_isolated_gets_no_collator() -> None:
    with pytest.raises(ContaminationError):
        BlockDiagonalPackingCollator(TOKENIZER, model=torch.nn.Linear(2, 2))


def test_it_keeps_no_reference_to_the_model() -> None:
    assert len(pickle.dumps(collator())) < 2000
    assert not any(isinstance(value, torch.nn.Module) for value in vars(collator()).values())


@pytest.mark.parametrize("context", sorted(set(multiprocessing.get_all_start_methods()) & {"fork", "spawn"}))
def test_it_travels_to_workers(context: str) -> None:
    loader = DataLoader(ROWS, batch_size=2, collate_fn=collator(), num_workers=1, multiprocessing_context=context)
    (batch,) = loader
    assert torch.equal(batch["input_ids"], collator()(ROWS)["input_ids"])
