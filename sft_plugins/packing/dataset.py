"""From masked rows to packed rows.

Invariant: every document of the data is in exactly one packed row, whole and unchanged, unless a policy that the caller
named dropped or cut it, and then the report counts it. A packed row is

    input_ids [T]   its documents end to end      labels [T]   likewise, −100 first in each      seq_lengths [N]   Σ = T
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.utils import tqdm

from sft_plugins._options import stored_rows
from sft_plugins._rows import TREE_COLUMNS
from sft_plugins.errors import PackingError
from sft_plugins.packing.arrow import Ints, TokenColumn, place, store
from sft_plugins.packing.documents import Admitted, Columns, Policies, admit, check_columns
from sft_plugins.packing.plan import PackPlan, check_capacity, plan_packs
from sft_plugins.packing.prefix_tree.buffer import check_sharing
from sft_plugins.packing.prefix_tree.fold import Forest, fold
from sft_plugins.packing.prefix_tree.report import PrefixReport
from sft_plugins.packing.prefix_tree.rows import lay
from sft_plugins.packing.report import PackReport, expected_padding

BATCH_TOKENS = 2**22
"""Tokens gathered at a time: the memory that packing needs beyond the data and the result."""


class Packed(NamedTuple):
    """Packed rows, and what packing them did."""

    dataset: Dataset
    report: PackReport


def pack_dataset(
    dataset: Dataset,
    max_length: int,
    *,
    overflow: str = "raise",
    unsupervised: str = "raise",
    extra_columns: str = "raise",
    seed: int | Sequence[int] | None = 0,
    share_prefixes: bool = False,
    cache_file: str | os.PathLike[str] | None = None,
) -> Packed:
    """Pack masked rows into rows of at most `max_length` tokens, with best-fit decreasing over the whole dataset.

    Equal to, with `documents` the rows that the policies leave:

        plan = plan_packs([len(d["input_ids"]) for d in documents], max_length, seed=seed)
        for pack in plan:
            yield {"input_ids": concat(documents[i]["input_ids"] for i in pack),
                   "labels": concat(documents[i]["labels"] for i in pack),
                   "seq_lengths": [len(documents[i]["input_ids"]) for i in pack]}

    Integer types stay what they are; `seq_lengths` are int32. The same dataset, options and seed give the same rows in
    every process, so each rank of a distributed run may pack for itself. Packing anew for the next epoch is the same
    call with another seed: `pack_dataset(dataset, 4096, seed=epoch)`.

    Args:
        dataset: one document per row, `input_ids` and `labels` (as `mask_dataset` makes them; the first label of each
            row is −100, since nothing comes before its token). It may have been selected, shuffled or concatenated.
        max_length: capacity of a packed row, in tokens.
        overflow: a document longer than that is an error (`"raise"`), left out (`"drop"`), or keeps its first
            `max_length` tokens (`"truncate"`: no end-of-turn token is put at the cut, and a document left without a
            supervised token is dropped). Never are rests packed as documents of their own: they would lack the prompt.
        unsupervised: a document without any supervised token is an error (`"raise"`) or left out (`"drop"`).
        extra_columns: further columns are an error (`"raise"`), left out (`"drop"`), or kept as one list per packed
            row with one value per document (`"carry"`).
        seed: shuffles documents of equal length, and the packed rows. `None` shuffles nothing.
        share_prefixes: fold rows that begin alike into trees, so that what they share is kept once: a conversation that was
            split for a template that rewrites history costs about what one rendering costs. A token that two rows train is
            never shared; trees are planned whole. Packed rows then carry `seq_parents` and `seq_depths` beside `seq_lengths`
            (see `sft_plugins.packing.prefix_tree`); `BlockDiagonalPackingCollator` proves them on its model.
        cache_file: where to write the packed rows, memory-mapped afterwards. By default a dataset in memory gives one
            in memory, and a dataset on disk one in memory up to 256 MiB; beyond, a `cache-*.arrow` beside its own cache
            files, which `dataset.cleanup_cache_files()` removes.

    Raises:
        PackingError: `bad_option`, `bad_capacity`, `bad_schema`, `streaming_dataset`, `already_packed`,
            `extra_columns`, `empty_dataset`; with the row: `bad_schema`, `length_mismatch`, `empty_document`,
            `first_label`, `overflow`, `no_supervised_tokens`, `padded_row`. Nothing is written then.

    Example:
        >>> rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, 6, 7], [-100, 9]]})
        >>> packed, report = pack_dataset(rows, 8)
        >>> packed[0]
        {'input_ids': [5, 6, 7, 8, 9], 'labels': [-100, 6, 7, -100, 9], 'seq_lengths': [3, 2]}
        >>> report.rows, report.lower_bound, report.fill
        (1, 1, 0.625)
    """
    policies = Policies(
        capacity=check_capacity(max_length), overflow=overflow, unsupervised=unsupervised, extra_columns=extra_columns
    )
    columns, extra = _read(dataset, policies)
    admitted = admit(columns, policies)
    if not len(admitted.rows):
        dropped = ", ".join(f"{kind} {loss.rows:,}" for kind, loss in admitted.lost.items())
        raise PackingError(f"no document is left to pack; dropped: {dropped}", code="empty_dataset")
    kept = extra if extra_columns == "carry" else []
    check_sharing(share_prefixes, kept)
    features = _features(dataset, kept)
    options: tuple[Any, ...] = (policies.capacity, overflow, unsupervised, extra_columns, seed)
    prefixes = None
    if share_prefixes:
        every = len(admitted.rows) == len(columns.ids.length)
        ids, labels = (column if every else column.some(admitted.rows) for column in (columns.ids, columns.labels))
        forest = fold(ids, labels, admitted.lengths, policies.capacity)
        prefixes = PrefixReport.of(forest, admitted.lengths)
        features = Features(features | {name: List(Value("int32")) for name in TREE_COLUMNS})
        options += ("share_prefixes",)
    if prefixes is not None and forest.shared:
        plan = plan_packs(forest.tokens, policies.capacity, seed=seed)
        batches = _tree_batches(columns, admitted, forest, plan, features)
    else:
        plan = plan_packs(admitted.lengths, policies.capacity, seed=seed)
        batches = _batches(dataset, columns, kept, admitted, plan, features)
    packed = store(dataset, batches, features, place(dataset, features, plan.tokens, cache_file), options)
    return Packed(packed, _report(columns.ids, admitted, plan, prefixes))


def _read(dataset: Dataset, policies: Policies) -> tuple[Columns, list[str]]:
    """The columns that say what is packed, and the names of those beyond `input_ids` and `labels`."""
    stored_rows(
        dataset,
        PackingError,
        call="pack_dataset(dataset['train'], max_length)",
        stream="use `pack_stream(dataset, max_length)`, which plans some rows at a time",
    )
    if not len(dataset) and "seq_lengths" not in dataset.column_names:
        raise PackingError("the dataset has no rows", code="empty_dataset")
    extra = check_columns(dataset.column_names, policies)
    mask = TokenColumn.of(dataset, "attention_mask", booleans=True) if "attention_mask" in extra else None
    return Columns(TokenColumn.of(dataset, "input_ids"), TokenColumn.of(dataset, "labels"), mask), extra


def _report(ids: TokenColumn, admitted: Admitted, plan: PackPlan, prefixes: PrefixReport | None) -> PackReport:
    lengths, counts = np.unique(admitted.lengths, return_counts=True)
    return PackReport(
        max_length=plan.max_length,
        rows_in=len(ids.length),
        tokens_in=int(ids.length.sum()),
        documents=len(admitted.rows),
        tokens=plan.tokens,
        supervised_tokens=int(admitted.supervised.sum()),
        rows=len(plan),
        longest=int(lengths[-1]),
        padded=expected_padding(lengths, counts),
        lost=admitted.lost,
        prefixes=prefixes,
    )


def _features(dataset: Dataset, carried: list[str]) -> Features:
    def tokens(name: str) -> List:
        kind = dataset.data.schema.field(name).type.value_type
        return List(Value("int64" if pa.types.is_null(kind) else str(kind)))

    own = {"input_ids": tokens("input_ids"), "labels": tokens("labels"), "seq_lengths": List(Value("int32"))}
    return Features(own | {name: List(dataset.features[name]) for name in carried})


def _batches(
    dataset: Dataset,
    columns: Columns,
    carried: list[str],
    admitted: Admitted,
    plan: PackPlan,
    features: Features,
) -> Iterator[pa.RecordBatch]:
    """The packed rows, about `BATCH_TOKENS` tokens at a time."""
    others = dataset.select_columns(carried).with_format("arrow") if carried else None
    for offsets, chosen in _steps(plan):
        documents, lengths = admitted.rows[chosen], admitted.lengths[chosen]
        # offsets of rows in documents [0, 2, 3], lengths [3, 2, 8]   →   offsets of rows in tokens [0, 5, 13]
        in_tokens = np.concatenate(([0], np.cumsum(lengths)))[offsets]
        arrays = [
            _lists(in_tokens, columns.ids.gather(documents, lengths)),
            _lists(in_tokens, columns.labels.gather(documents, lengths)),
            _lists(offsets, lengths.astype(np.int32)),
        ]
        if TREE_COLUMNS[0] in features:  # rows that share nothing: each a tree of one segment
            arrays += [_lists(offsets, np.full(len(lengths), value, np.int32)) for value in (0, -1)]
        if others is not None:
            values = others[documents].combine_chunks()
            arrays += [_lists(offsets, _only(values[name])) for name in carried]
        yield pa.record_batch(arrays, schema=features.arrow_schema)


def _tree_batches(
    columns: Columns, admitted: Admitted, forest: Forest, plan: PackPlan, features: Features
) -> Iterator[pa.RecordBatch]:
    """The same where the plan is one of trees."""
    for offsets, chosen in _steps(plan):
        laid = lay(forest, chosen, offsets, admitted.rows, columns.ids, columns.labels)
        of_segments = (laid.lengths, laid.depths, laid.parents)
        arrays = [_lists(laid.in_tokens, laid.ids), _lists(laid.in_tokens, laid.labels)]
        arrays += [_lists(laid.in_segments, values.astype(np.int32)) for values in of_segments]
        yield pa.record_batch(arrays, schema=features.arrow_schema)


def _steps(plan: PackPlan) -> Iterator[tuple[Ints, Ints]]:
    """Some rows of the plan at a time: where each begins among the documents that they hold, and those documents."""
    step = max(1, BATCH_TOKENS // plan.max_length)
    progress = tqdm(total=len(plan), desc="Packing", unit=" rows", delay=1)
    for begin in range(0, len(plan), step):
        offsets = plan.offsets[begin : begin + step + 1]
        yield offsets - offsets[0], plan.indices[offsets[0] : offsets[-1]]
        progress.update(len(offsets) - 1)
    progress.close()


def _lists(offsets: Ints, values: Any) -> pa.ListArray:
    return pa.ListArray.from_arrays(offsets.astype(np.int32), values)


def _only(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
