"""Packed trees: from rows to packed rows and back, and nobody reads them as documents."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sft_plugins.errors import PackingError
from sft_plugins.masking import check_masks
from sft_plugins.packing import BlockDiagonalPackingCollator, RowCost, deal_rows, even_rows, pack_dataset
from sft_plugins.packing import dataset as module
from sft_plugins.packing.prefix_tree.fold import fold
from testkit.prefix_forest import Row, forests, paths_of, segments_of, trained
from testkit.tiny_models import build
from testkit.tokenizers import build_tokenizer

HISTORY = [11 + i for i in range(30)]
ROWS: list[Row] = [
    ([*HISTORY, 91, 5, 2], [-100] * 30 + [91, 5, 2]),
    ([*HISTORY, 5, 2, 6, 91, 7, 2], [-100] * 33 + [91, 7, 2]),
    ([8, 9, 2], [-100, 9, 2]),
]


def dataset_of(rows: list[Row]) -> Dataset:
    return Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows])


def paths(packed: Dataset) -> list[Row]:
    return [path for row in packed for path in paths_of(segments_of(row))]


@settings(max_examples=150, deadline=None)
@given(forests(), st.integers(0, 30), st.integers(1, 4))
def test_rows_in_are_paths_out(rows: list[Row], more: int, multiple: int) -> None:
    """P8 for trees: every trained token as often as before, rows made even included; a row costs what its pairs cost."""
    kept = [(ids, labels) for ids, labels in rows if set(labels) != {-100}]
    assume(kept)
    capacity = max(len(ids) for ids, _ in rows) + more
    with patch.object(module, "fold", partial(fold, least=1)):
        packed, report = pack_dataset(dataset_of(rows), capacity, unsupervised="drop", share_prefixes=True)
    assert trained(paths(packed)) == trained(kept)
    assert all(len(row["input_ids"]) <= capacity for row in packed)
    assert report.prefixes is not None
    assert report.tokens == report.prefixes.tree_tokens == sum(map(len, packed["input_ids"]))
    lost = sum(loss.tokens for loss in report.lost.values())
    assert report.tokens_in == report.tokens + report.prefixes.shared_tokens + lost
    assert report.supervised_tokens == sum(trained(kept).values())
    assert (report.documents, report.prefixes.segments) == (len(kept), sum(map(len, packed["seq_lengths"])))

    costs = RowCost(linear=3.0, quadratic=2.0).per_row(packed)
    for row, cost in zip(packed, costs, strict=True):
        seen = [depth + i for tokens, _, _, depth in segments_of(row) for i in range(len(tokens))]
        assert cost == sum(3 + 2 * (2 * before + 1) for before in seen)  # (p + 1)² − p² pairs both ways
    if len(packed) + -len(packed) % multiple <= report.prefixes.trees:
        even = even_rows(packed, multiple)
        assert len(even) % multiple == 0
        assert trained(paths(even)) == trained(kept)


def test_the_columns_of_a_packed_tree() -> None:
    packed, report = pack_dataset(dataset_of(ROWS), 64, seed=None, share_prefixes=True)
    (row,) = packed
    assert sorted(row) == ["input_ids", "labels", "seq_depths", "seq_lengths", "seq_parents"]
    assert (row["seq_lengths"], row["seq_depths"], row["seq_parents"]) == ([36, 33, 3], [0, 29, 0], [-1, 0, -1])
    assert row["input_ids"] == ROWS[1][0] + ROWS[0][0][29:] + ROWS[2][0]
    assert row["labels"] == ROWS[1][1] + [-100, 91, 5, 2] + ROWS[2][1]
    assert (report.tokens, report.prefixes and report.prefixes.shared_tokens) == (43, 29)
    assert "shared beginnings" in str(report)
    assert report.to_dict()["prefixes"]["trees"] == 2


def test_another_seed_packs_the_same_trees_anew() -> None:
    rows = [
        ([50 + i, *(ids + labels)[1:]], lab) for i in range(20) for ids, labels, lab in [(ROWS[0][0], [], ROWS[0][1])]
    ]
    one, two = (pack_dataset(dataset_of(rows), 70, seed=seed, share_prefixes=True) for seed in (0, 1))
    assert one.dataset[:] != two.dataset[:]
    assert trained(paths(one.dataset)) == trained(paths(two.dataset)) == trained(rows)
    assert one.report == two.report


def test_it_is_off_by_default() -> None:
    plain, report = pack_dataset(dataset_of(ROWS), 64)
    assert "seq_parents" not in plain.column_names
    assert report.prefixes is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(40, 80), st.integers(0, 2), st.booleans())
def test_rows_that_share_nothing_are_packed_as_ever(lengths: list[int], capacity: int, seed: int, less: bool) -> None:
    """Row for row what the option off gives, each document a tree of its own; where rows are dropped before, too."""
    rows = dataset_of([([100 + i] * n, [-100] * (n - 1) + [100 + i]) for i, n in enumerate(lengths)])
    options: dict[str, Any] = {"overflow": "drop", "seed": seed}
    most = max(min(lengths), capacity - 20 if less else capacity)
    plain, folded = (pack_dataset(rows, most, share_prefixes=share, **options) for share in (False, True))
    assert folded.dataset.select_columns(plain.dataset.column_names)[:] == plain.dataset[:]
    assert all(set(parents) == {-1} for parents in folded.dataset["seq_parents"])
    assert all(set(depths) == {0} for depths in folded.dataset["seq_depths"])
    assert folded.report.prefixes is not None
    pairs = sum(n * (n + 1) // 2 for n in lengths if n <= most)
    assert (folded.report.prefixes.row_pairs, folded.report.prefixes.tree_pairs) == (pairs, pairs)
    assert (folded.report.prefixes.shared_tokens, folded.report.tokens) == (0, plain.report.tokens)


TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=2)


def test_batches_of_trees_train_what_their_rows_train() -> None:
    """Several packed rows and padding in one batch: the model's own loss, a mean over trained tokens, and its gradients."""
    rows = [([60 + i, *ids[1:]], labels) for i in range(2) for ids, labels in ROWS]
    packed = pack_dataset(dataset_of(rows), 50, share_prefixes=True).dataset
    assert len(packed) > 1
    model = build("llama").model
    alone = copy.deepcopy(model)
    collator = BlockDiagonalPackingCollator(TOKENIZER, model=model, pad_to_multiple_of=64)
    batch = collator(list(packed))
    assert batch["input_ids"].shape[1] % 64 == 0
    loss = model(**batch).loss
    losses = [alone(input_ids=torch.tensor([i]), labels=torch.tensor([ls]), use_cache=False).loss for i, ls in rows]
    counts = [sum(label >= 0 for label in labels) for _, labels in rows]
    expected = sum(one * count for one, count in zip(losses, counts, strict=True)) / sum(counts)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5 * float(other.grad.abs().max()))


def test_no_collator_reads_a_tree_as_documents() -> None:
    """Never silently plain: refused where a host has pruned its columns, and where the model was not proved to take it."""
    packed = pack_dataset(dataset_of(ROWS), 64, share_prefixes=True).dataset
    model = build("llama").model
    collator = BlockDiagonalPackingCollator(TOKENIZER, model=model)
    for pruned in (["seq_parents"], ["seq_depths"], ["seq_parents", "seq_depths"]):
        with pytest.raises(PackingError) as caught:
            collator([packed.remove_columns(pruned)[0]])
        assert (caught.value.code, caught.value.row) == ("boundaries" if len(pruned) > 1 else "bad_schema", 0)
    moved = {**packed[0], "input_ids": [7 if i == 36 else t for i, t in enumerate(packed[0]["input_ids"])]}
    other_depth = {**packed[0], "seq_depths": [d + (d > 0) for d in packed[0]["seq_depths"]]}
    for wrong in (other_depth, {**packed[0], "seq_parents": [-1] * len(packed[0]["seq_parents"])}, moved):
        with pytest.raises(PackingError) as caught:
            collator([wrong])
        assert caught.value.code == "boundaries"
    pruned = packed.remove_columns(["seq_parents", "seq_depths"])
    assert check_masks(pruned, build_tokenizer("qwen")).failures.keys() == {"boundaries"}
    flat = pack_dataset(dataset_of([ROWS[2]]), 64, share_prefixes=True).dataset
    plain = collator([flat[0]])
    assert plain["cu_seq_lens_q"].tolist() == [0, 3], "a row without branches is what it is without trees"
    assert not {"seq_parents", "seq_depths"} & plain.keys()

    dynamic = build("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}).model
    with pytest.raises(PackingError, match="the row holds trees") as caught:
        BlockDiagonalPackingCollator(TOKENIZER, model=dynamic)([packed[0]])
    assert caught.value.code == "prefix_trees"


def test_dealt_rows_keep_their_trees() -> None:
    rows = [([60 + i, *ids[1:]], labels) for i in range(6) for ids, labels in ROWS[:2]]
    packed = pack_dataset(dataset_of(rows), 45, share_prefixes=True).dataset
    dealt, _ = deal_rows(packed, ranks=2)
    assert trained(paths(dealt)) == trained(paths(packed)) == trained(rows)


@pytest.mark.parametrize(
    ("rows", "options", "code"),
    [
        (dataset_of(ROWS).add_column("tag", ["a", "b", "c"]), {"extra_columns": "carry"}, "extra_columns"),
        (dataset_of(ROWS), {"share_prefixes": "yes"}, "bad_option"),
        (dataset_of(ROWS), {"max_length": 32}, "overflow"),
        (DatasetDict(train=dataset_of(ROWS)), {}, "bad_schema"),
    ],
)
def test_bad_input(rows: Any, options: dict[str, Any], code: str) -> None:
    with pytest.raises(PackingError) as caught:
        pack_dataset(rows, **{"max_length": 64, "share_prefixes": True} | options)
    assert caught.value.code == code


def test_cut_rows_fold_as_far_as_they_are_kept() -> None:
    packed, report = pack_dataset(dataset_of(ROWS), 32, overflow="truncate", share_prefixes=True)
    assert trained(paths(packed)) == trained(
        [(ids[:32], labels[:32]) for ids, labels in ROWS if set(labels[:32]) != {-100}]
    )
    assert report.lost["truncated"].rows == 1
    assert np.all([len(row["input_ids"]) <= 32 for row in packed])
