"""Rows to files: Arrow as `save_to_disk` lays it out, or Parquet; in parts, in bounded memory, whole or not at all.

input_ids 5 6 7   labels −100 6 7    →    attention_mask 1 1 1    loss_mask 0 1 1    position_ids 0 1 2    lengths 3
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins._files import whole_or_not_at_all
from sft_plugins.integrations.layouts.hosts import Layout

ROWS = "rows"
MANIFEST = "manifest.json"
BATCH_ROWS = 1000
PART_TOKENS = 2**27
"""Tokens of a file, after which the next begins: about a gigabyte of Arrow."""

_LISTS = {"input_ids": "int32", "labels": "int32", "seq_lengths": "int32", "position_ids": "int32", "attention_mask": "int8",
          "loss_mask": "int8"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is said of the rows beside them.

    Attributes:
        facts: as JSON has them; `rows`, `tokens`, `supervised_tokens`, `columns` and `files` are added by `write_rows`.
        model: whose tokenizer, for the lines of configuration.
    """

    facts: Mapping[str, Any]
    model: str


def write_rows(
    dataset: Dataset,
    folder: Path,
    layout: Layout,
    manifest: Manifest,
    *,
    packed: bool = False,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write `dataset` (`input_ids`, `labels`, and `seq_lengths` of packed rows) to `folder` as `layout` has it.

    Args:
        folder: new or empty; it takes its place once everything in it is written.
        advance: called with the number of rows that were written.

    Returns:
        What `folder/manifest.json` holds.

    Raises:
        OSError: for a full disk; nothing is left behind then.
    """
    columns = layout.packed if packed and layout.packed else layout.columns
    with whole_or_not_at_all(folder) as draft:
        rows = draft / ROWS
        rows.mkdir(parents=True)
        counts = _Counts()
        tables = counts.of(_tables(dataset, columns, advance))
        fingerprint = hashlib.sha256(json.dumps(dict(manifest.facts), sort_keys=True).encode()).hexdigest()[:16]
        files = (
            _write_arrow(tables, rows, columns, fingerprint) if layout.form == "arrow" else _write_parquet(tables, rows)
        )
        written = {
            **manifest.facts,
            "host": layout.host,
            "rows": counts.rows,
            "tokens": counts.tokens,
            "supervised_tokens": counts.supervised,
            "longest": counts.longest,
            "columns": list(columns),
            "files": files,
        }
        (draft / MANIFEST).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        lines = layout.lines(folder.resolve() / ROWS, manifest.model, packed)
        (draft / layout.file).write_text(lines, encoding="utf-8")
    return written


@dataclass
class _Counts:
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0

    def of(self, tables: Iterator[tuple[pa.Table, np.ndarray, int]]) -> Iterator[pa.Table]:
        for table, lengths, supervised in tables:
            self.rows += len(lengths)
            self.tokens += int(lengths.sum())
            self.supervised += supervised
            self.longest = max(self.longest, int(lengths.max()))
            yield table


def _tables(
    dataset: Dataset, columns: tuple[str, ...], advance: Callable[[int], None] | None
) -> Iterator[tuple[pa.Table, np.ndarray, int]]:
    """Some rows at a time: their columns, their lengths, and how many of their tokens carry loss."""
    arrow = dataset.with_format("arrow")
    for start in range(0, len(dataset), BATCH_ROWS):
        table = arrow[start : start + BATCH_ROWS]
        lengths = pa.compute.list_value_length(table["input_ids"]).to_numpy()
        labels = pa.compute.list_flatten(table["labels"]).to_numpy()
        supervised = labels != IGNORE_INDEX
        made = {
            "attention_mask": lambda lengths=lengths: np.ones(lengths.sum(), np.int8),
            "loss_mask": lambda supervised=supervised: supervised.astype(np.int8),
            "position_ids": lambda lengths=lengths: _positions(lengths),
        }
        arrays = []
        for name in columns:
            if name == "lengths":
                arrays.append(pa.array(lengths, pa.int32()))
            elif name in made:
                arrays.append(_lists(lengths, made[name](), name))
            else:
                values = pa.compute.list_flatten(table[name]).to_numpy()
                arrays.append(_lists(pa.compute.list_value_length(table[name]).to_numpy(), values, name))
        yield pa.table(arrays, names=list(columns)), lengths, int(supervised.sum())
        if advance is not None:
            advance(len(lengths))


def _positions(lengths: np.ndarray) -> np.ndarray:
    """Lengths 3, 2 → 0 1 2 0 1."""
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.arange(len(starts)) - starts


def _lists(lengths: np.ndarray, values: np.ndarray, name: str) -> pa.ListArray:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values.astype(_LISTS[name])))


def _parts(tables: Iterator[pa.Table], open_part: Callable[[int, pa.Schema], Any]) -> list[tuple[int, int]]:
    """Write every table, `PART_TOKENS` tokens to a part; how many parts there are, and the rows of each."""
    parts: list[tuple[int, int]] = []
    writer: Any = None
    tokens = rows = 0
    for table in tables:
        if writer is None:
            writer, tokens, rows = open_part(len(parts), table.schema), 0, 0
        writer.write_table(table)
        tokens += len(pa.compute.list_flatten(table["input_ids"]))
        rows += len(table)
        if tokens >= PART_TOKENS:
            writer.close()
            writer = None
            parts.append((len(parts), rows))
    if writer is not None:
        writer.close()
        parts.append((len(parts), rows))
    return parts


def _write_parquet(tables: Iterator[pa.Table], folder: Path) -> list[dict[str, Any]]:
    name = "rows-{:05d}.parquet".format
    parts = _parts(tables, lambda part, schema: pa.parquet.ParquetWriter(folder / name(part), schema))
    return [{"name": f"{ROWS}/{name(part)}", "rows": rows} for part, rows in parts]


def _write_arrow(
    tables: Iterator[pa.Table], folder: Path, columns: tuple[str, ...], fingerprint: str
) -> list[dict[str, Any]]:
    """The files that `datasets.load_from_disk` reads, in the words of datasets 3, which 4 and 5 read as well."""
    features = {name: _feature(name) for name in columns}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    name = "rows-{:05d}.arrow".format

    def open_part(part: int, schema: pa.Schema) -> Any:
        return pa.ipc.new_stream(str(folder / name(part)), schema.with_metadata(metadata))

    parts = _parts(tables, open_part)
    state = {
        "_data_files": [{"filename": name(part)} for part, _ in parts],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}, indent=2), encoding="utf-8")
    return [{"name": f"{ROWS}/{name(part)}", "rows": rows} for part, rows in parts]


def _feature(name: str) -> dict[str, Any]:
    if name == "lengths":
        return {"dtype": "int32", "_type": "Value"}
    return {"feature": {"dtype": _LISTS[name], "_type": "Value"}, "_type": "Sequence"}
