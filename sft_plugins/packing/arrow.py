"""Token lists in Arrow: a column read where it lies, and packed rows written to memory or to a mapped file.

Invariant: no token of a data set passes through a Python object, nothing is copied but what `gather` returns, and a file
appears whole or not at all, where the user's datasets already keep theirs.

    [[7, 8], [9]] in one Arrow chunk   →   values [7, 8, 9], start [0, 2], length [2, 1], chunk [0, 0]
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features, is_caching_enabled
from datasets.fingerprint import Hasher, get_temporary_cache_files_directory

from sft_plugins._files import whole_or_not_at_all
from sft_plugins.errors import PackingError
from sft_plugins.packing.compiled import compiled

Ints = npt.NDArray[Any]

THREADS = min(8, os.cpu_count() or 1)
"""Threads that read and copy tokens. More than a few would only wait for memory."""

_FEW = 64

IN_MEMORY_BYTES = 2**28
"""Results of a dataset on disk up to this size are kept in memory; larger ones go to a file."""

_REMEDIES = {
    "attention_mask": "give one 1 per token, or leave the column out",
    "seq_lengths": "take the rows as pack_dataset made them",
}
_MASK_FIRST = "tokenise and mask the rows first, {mask_dataset:`mask_dataset(dataset, PromptMasker(tokenizer))`}"


@dataclass(frozen=True, eq=False)
class TokenColumn:
    """Documents of one column, in the dataset's order (after any `select` or `shuffle`).

    Attributes:
        values: flat integers of each Arrow chunk, zero-copy and read-only.
        chunk, start, length: `[n]`, the chunk of each document, its first position there, its tokens.
    """

    values: list[Ints]
    chunk: Ints
    start: Ints
    length: Ints

    @classmethod
    def of(cls, dataset: Dataset, name: str, *, booleans: bool = False) -> TokenColumn:
        """Read column `name`; booleans, where they are allowed, as 0 and 1.

        Raises:
            PackingError: `bad_schema` if it holds anything but lists of integers, or (with the row) a null.
        """
        column = dataset.data.column(name)
        _check_type(name, column.type, booleans)
        values: list[Ints] = []
        chunk, start, length, null = (
            np.empty(len(column), dtype) for dtype in (np.int32, np.int64, np.int64, np.bool_)
        )
        at = 0
        for array in column.chunks:
            here = slice(at, at + len(array))
            chunk[here] = len(values)
            start[here], length[here] = _extents(array)
            null[here] = _nulls(array, start[here], length[here])
            values.append(_numbers(array.values))
            at += len(array)
        if dataset._indices is not None:  # what `select` and `shuffle` leave instead of moving rows
            rows = dataset._indices.column(0).to_numpy()
            chunk, start, length, null = chunk[rows], start[rows], length[rows], null[rows]
        if null.any():
            raise PackingError(
                f"column {name!r} holds a null",
                code="bad_schema",
                row=int(np.argmax(null)),
                remedy="every row needs a list of integers; filter out rows without one",
            )
        return cls(values, chunk, start, length)

    @classmethod
    def of_arrays(cls, arrays: Sequence[Ints]) -> TokenColumn:
        """The column of documents that lie in memory, one array each."""
        length = np.array([len(array) for array in arrays], np.int64)
        return cls([np.concatenate(arrays)], np.zeros(len(arrays), np.int32), np.cumsum(length) - length, length)

    def some(self, documents: Ints) -> TokenColumn:
        """The column of `documents` alone."""
        return TokenColumn(self.values, self.chunk[documents], self.start[documents], self.length[documents])

    def first(self) -> Ints:
        """First integer of every document; all documents hold at least one."""
        out = np.empty(len(self.start), np.int64)
        for values, part in self.by_chunk(np.arange(len(self.start))):
            out[part] = values[self.start[part]]
        return out

    def count_unlike(self, value: int, lengths: Ints) -> Ints:
        """Per document, how many of its first `lengths` integers differ from `value`."""
        out = np.empty(len(self.start), np.int64)

        def count(values: Ints, part: Ints) -> None:
            out[part] = compiled(_count_unlike)(values, self.start[part], lengths[part], value)

        self.in_threads(count, np.arange(len(self.start)))
        return out

    def gather(self, documents: Ints, lengths: Ints, begins: Ints | None = None) -> Ints:
        """`lengths` integers of each of `documents`, from its first or from `begins` on, end to end.

        Equal to `np.concatenate([column[d][b : b + n] for d, n, b in zip(documents, lengths, begins)])`.
        """
        ends = np.cumsum(lengths, dtype=np.int64)
        targets = ends - lengths
        starts = self.start[documents] if begins is None else self.start[documents] + begins
        out = np.empty(ends[-1] if len(ends) else 0, self.values[0].dtype)

        def copy(values: Ints, part: Ints) -> None:
            compiled(_copy)(values, starts[part], lengths[part], targets[part], out)

        self.in_threads(copy, documents)
        return out

    def in_threads(self, work: Callable[[Ints, Ints], None], documents: Ints) -> None:
        """`work(values, part)` until every position in `documents` was in one `part`; the loops run without the GIL."""
        if len(documents) < _FEW:  # threads would cost more than they do
            for values, part in self.by_chunk(documents):
                work(values, part)
            return
        with ThreadPoolExecutor(THREADS) as threads:
            jobs = [
                threads.submit(work, values, share)
                for values, part in self.by_chunk(documents)
                for share in np.array_split(part, THREADS)
            ]
        for job in jobs:
            job.result()

    def by_chunk(self, documents: Ints) -> Iterator[tuple[Ints, Ints]]:
        """Every chunk that holds some of `documents`, and which of them (positions in `documents`)."""
        chunks = self.chunk[documents]
        order = np.argsort(chunks, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1):
            if len(part):
                yield self.values[chunks[part[0]]], part


def _check_type(name: str, kind: pa.DataType, booleans: bool) -> None:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    of_integers = any(is_kind(kind) for is_kind in lists) and (
        pa.types.is_integer(kind.value_type)
        or pa.types.is_null(kind.value_type)  # every list is empty
        or (booleans and pa.types.is_boolean(kind.value_type))
    )
    if not of_integers:
        raise PackingError(
            f"column {name!r} has type {kind}; expected one list of integers per row",
            code="bad_schema",
            remedy=_REMEDIES.get(name, _MASK_FIRST),
        )


def _extents(array: pa.Array) -> tuple[Ints, Ints]:
    """Start of every list in `array.values`, and its length."""
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        start = (array.offset + np.arange(len(array), dtype=np.int64)) * size
        return start, np.full(len(array), size, np.int64)
    offsets = array.offsets.to_numpy()  # of a slice: its own part, still counted from the start of `values`
    return offsets[:-1], np.diff(offsets)


def _nulls(array: pa.Array, start: Ints, length: Ints) -> Ints:
    """Which rows are null or hold a null."""
    null = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else np.zeros(len(array), np.bool_)
    if array.values.null_count:
        before = np.zeros(len(array.values) + 1, np.int64)
        np.cumsum(array.values.is_null().to_numpy(zero_copy_only=False), out=before[1:])
        null = null | (before[start + length] > before[start])
    return null


def _numbers(values: pa.Array) -> Ints:
    if pa.types.is_null(values.type):
        return np.zeros(len(values), np.int64)
    if pa.types.is_boolean(values.type):  # bits
        values = values.cast(pa.uint8())
    if values.null_count:  # they lie outside the rows in use, or `of` has refused them
        values = values.fill_null(0)
    return values.to_numpy()


# ---- Where packed rows live ----


def place(dataset: Dataset, features: Features, tokens: int, cache_file: str | os.PathLike[str] | None) -> Path | None:
    """Where the packed rows are written; None for memory."""
    if cache_file is not None:
        return Path(cache_file)
    width = sum(np.dtype(features[name].feature.dtype).itemsize for name in ("input_ids", "labels"))
    if not dataset.cache_files or tokens * width <= IN_MEMORY_BYTES:
        return None
    beside = Path(dataset.cache_files[0]["filename"]).parent
    if not is_caching_enabled() or not os.access(beside, os.W_OK):
        return Path(get_temporary_cache_files_directory()) / f"cache-{uuid.uuid4().hex}.arrow"
    return beside


def store(
    dataset: Dataset, batches: Iterator[pa.RecordBatch], features: Features, path: Path | None, options: Any
) -> Dataset:
    """Write the batches to `path` (a folder: to a file named by the fingerprint) or keep them in memory."""
    fingerprint = Hasher.hash(("pack_dataset", dataset._fingerprint, options))
    info = dataset.info.copy()
    info.features = features
    if path is None:
        table = pa.Table.from_batches(list(batches), schema=features.arrow_schema)
        return Dataset(table, info=info, split=dataset.split, fingerprint=fingerprint)

    if path.is_dir():
        path = path / f"cache-{fingerprint}.arrow"
    metadata = {"huggingface": json.dumps({"info": {"features": features.to_dict()}, "fingerprint": fingerprint})}
    schema = features.arrow_schema.with_metadata(metadata)
    with (
        whole_or_not_at_all(path) as draft,
        pa.OSFile(str(draft), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
        ThreadPoolExecutor(1) as behind,  # writes one batch while the next is gathered
    ):
        written: Future[None] | None = None
        for batch in batches:
            if written:
                written.result()
            written = behind.submit(writer.write_batch, batch)
        if written:
            written.result()
    return Dataset.from_file(str(path), info=info, split=dataset.split)


# ---- Compiled. A view per document lets the inner loops run over contiguous memory, many integers at a time. ----


def _count_unlike(values: Ints, starts: Ints, lengths: Ints, value: int) -> Ints:
    out = np.empty(len(starts), np.int64)
    for i in range(len(starts)):
        count = np.int32(0)
        for token in values[starts[i] : starts[i] + lengths[i]]:
            count += np.int32(token != value)
        out[i] = count
    return out


def _copy(values: Ints, starts: Ints, lengths: Ints, at: Ints, out: Ints) -> None:
    for i in range(len(starts)):
        source, target = values[starts[i] : starts[i] + lengths[i]], out[at[i] : at[i] + lengths[i]]
        for j in range(len(source)):
            target[j] = source[j]
