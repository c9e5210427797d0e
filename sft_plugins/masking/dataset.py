"""`mask_dataset`: a data set of rows → a data set of `input_ids` and `labels`, with a report of what became of each.

datasets.Dataset      map over Arrow batches, in `num_proc` processes, cached on disk under a fingerprint of the data,
                      the tokenizer, the template and the options; the report is read off the result, so that a cached
                      result brings the same one
IterableDataset       the same per batch as rows are drawn; the report grows with them
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.errors import MaskingError
from sft_plugins.masking.encoding.fast import EncoderDiffersError
from sft_plugins.masking.examples.columns import unread_columns
from sft_plugins.masking.examples.roles import ROLES
from sft_plugins.masking.examples.values import json_columns, with_json_read
from sft_plugins.masking.masker import Outcome, PromptMasker
from sft_plugins.masking.report import PREFIX_ROWS, PREFIX_TOKENS, MaskReport, repeated_prefixes
from sft_plugins.masking.switches import switches_without_split
from sft_plugins.masking.turns.masked import MaskedExample

_BATCH = 384
_OF_STREAM = 192  # for all of which the first row waits
ORIGINS = ("trained", *ROLES, "template", "untrained")
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
# One record per row out, and one without ids per row of data that failed; they leave with the report.
RECORD = Features(
    {
        **FEATURES,
        "source": Value("int64"),
        "code": Value("string"),
        "message": Value("string"),
        "too_long": Value("bool"),
        "roles": List(Value("int32")),
        "repeated_tokens": Value("int32"),
        "lost_tokens": Value("int32"),
        "lost_supervised": Value("int32"),
        "told": Value("string"),  # JSON of `modes`, `changes` and `unread`; null where there is none, as in most rows
    }
)


class Masked(NamedTuple):
    """What `mask_dataset` returns."""

    dataset: Dataset | IterableDataset
    report: MaskReport


def mask_dataset(dataset: Dataset | IterableDataset, masker: PromptMasker, *, num_proc: int | None = None) -> Masked:
    """Mask every row of `dataset`: the naive `[row for example in dataset for row in masker.encode(example)]`, counted.

    Args:
        dataset: rows in any form that `PromptMasker` takes. Where a column is JSON text or of the feature `Json`, a null among
            the arguments of a call is one; elsewhere it is a hole that columnar storage filled, and left out.
        masker: says what is masked and what becomes of rows that cannot be.
        num_proc: processes; for a `Dataset` only.

    Returns:
        `Masked(dataset, report)`; the data set has the columns `input_ids` and `labels` (int32 lists) and nothing else.
        Of an `IterableDataset` the report fills as rows are drawn in this process.

    Raises:
        MaskingError: for the first row that fails under `errors="raise"`, with its number; `empty_dataset`, `bad_schema`,
            `bad_option`.
    """
    if isinstance(dataset, (DatasetDict, dict)):
        names = ", ".join(map(repr, dataset))
        raise MaskingError(
            f"got several splits ({names}).",
            code="bad_schema",
            remedy="Mask one at a time: mask_dataset(data['train'], …).",
        )
    if isinstance(dataset, IterableDataset):
        if num_proc is not None:
            raise MaskingError(
                f"num_proc={num_proc} with an IterableDataset.",
                code="bad_option",
                remedy="Leave it out; a DataLoader's workers draw from a stream side by side.",
            )
        return _mask_stream(dataset, masker)
    if not isinstance(dataset, Dataset):
        raise MaskingError(
            f"expected a datasets.Dataset or IterableDataset, got {type(dataset).__name__}.",
            code="bad_schema",
            remedy="Dataset.from_list([...]) makes one of a list of rows.",
        )
    if dataset.format["type"] == "custom":
        raise MaskingError(
            "the dataset has a transform (`set_transform`, `with_transform`), and rows are masked as they are stored.",
            code="bad_schema",
            remedy="Give the function to `dataset.map`, or take it off with `dataset.with_format(None)`.",
        )
    if len(dataset) == 0:
        raise MaskingError("the dataset has no rows.", code="empty_dataset", remedy="Check the file and the split.")
    facts = f"{dataset._fingerprint} {masker.fingerprint()} {RECORD}"
    fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:32]

    def encoded() -> Dataset:
        return dataset.with_format("arrow").map(
            _EncodeTable(masker, json_columns(dataset.features)),
            with_indices=True,
            batched=True,
            batch_size=_BATCH,
            remove_columns=dataset.column_names,
            features=RECORD,
            num_proc=num_proc,
            new_fingerprint=fingerprint,
            desc="Masking",
        )

    try:
        records = encoded()
    except EncoderDiffersError as error:  # from the first row on, since an earlier one may have been wrong unseen
        masker.encode_slowly(str(error))
        records = encoded()
    masked = from_records(records, masker, rows_in=len(dataset), columns=dataset.column_names)
    if masked.report.split_rows:
        masked.report.notes += _without_split(dataset, records, masker)
    return masked


def _without_split(dataset: Dataset, records: Dataset, masker: PromptMasker) -> list[str]:
    """What the first conversation that was split says of the switches of its template."""
    code, source = (records.with_format("arrow")[:][name] for name in ("code", "source"))
    sources = source.filter(pa.compute.is_null(code)).to_numpy()
    found, counts = np.unique(sources, return_counts=True)
    row = dataset.with_format(None)[int(found[np.argmax(counts > 1)])]
    if stored := json_columns(dataset.features):
        row = with_json_read(row, stored)
    names = switches_without_split(masker, {name: value for name, value in row.items() if value is not None})
    if not names:
        return []
    return [
        f"the chat template keeps its history under {' or '.join(names)} (chat_template_kwargs): conversations would be one "
        "row each, if generation sets it as well"
    ]


def from_records(records: Dataset, masker: PromptMasker, *, rows_in: int, columns: Iterable[str]) -> Masked:
    """The rows to train on, out of the records (`RECORD`) of all `rows_in` rows of data with `columns`, and their report."""
    report = _read_report(records.with_format("arrow"), masker, rows_in=rows_in)
    report.unread_columns = unread_columns(columns, masker.reading)
    masked = records.select_columns(["input_ids", "labels"]).with_format(None)
    if report.failures:
        kept = np.flatnonzero(pa.compute.is_null(records.data["code"]).to_numpy())
        masked = masked.select(kept).flatten_indices() if len(kept) else masked.select([])
    return Masked(masked, report)


class _EncodeTable:
    """Arrow table of rows, their numbers → Arrow table of records. A class, so that it travels to other processes."""

    def __init__(self, masker: PromptMasker, columns: Mapping[str, Any]) -> None:
        self.masker, self.columns = masker, columns

    def __call__(self, table: pa.Table, indices: list[int]) -> pa.Table:
        rows = table.to_pylist()
        if self.columns:
            rows = [with_json_read(row, self.columns) for row in rows]
        return to_records(self.masker.encode_batch_or_stop(rows), indices, self.masker)


def to_records(outcomes: list[Outcome], indices: list[int], masker: PromptMasker) -> pa.Table:
    """Outcomes as a table of `RECORD`s; raises the first error that the masker's options do not let drop."""
    rows: list[MaskedExample] = []
    sources: list[int] = []
    failures: list[tuple[int, MaskingError, bool]] = []
    for index, outcome in zip(indices, outcomes, strict=True):
        rows += outcome.rows
        sources += [index] * len(outcome.rows)
        for error in outcome.errors:
            if not masker.options.drops(error.code):
                raise error.at_row(index)
            failures.append((index, error, outcome.too_long))
    none, blank = [None] * len(rows), [0] * len(failures)
    arrays = [row.arrays for row in rows]
    origins = [row.role_tokens.get(name, 0) for row in rows for name in ORIGINS]

    def lists(flat: np.ndarray, lengths: list[int]) -> pa.ListArray:
        offsets = np.concatenate(([0], np.cumsum([*lengths, *blank], dtype=np.int64)))
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(flat))

    def tokens(which: int) -> pa.ListArray:
        own = [pair[which] for pair in arrays]
        flat = np.concatenate(own).astype(np.int32, copy=False) if own else np.empty(0, np.int32)
        return lists(flat, [len(one) for one in own])

    return pa.table(
        {
            "input_ids": tokens(0),
            "labels": tokens(1),
            "source": pa.array([*sources, *(index for index, _, _ in failures)], pa.int64()),
            "code": pa.array([*none, *(error.code for _, error, _ in failures)], pa.string()),
            "message": pa.array([*none, *(error.message for _, error, _ in failures)], pa.string()),
            "too_long": pa.array([*none, *(too_long for _, _, too_long in failures)], pa.bool_()),
            "roles": lists(np.array(origins, np.int32), [len(ORIGINS)] * len(rows)),
            **{
                name: pa.array([*(getattr(row, name) for row in rows), *blank], pa.int32())
                for name in ("repeated_tokens", "lost_tokens", "lost_supervised")
            },
            "told": pa.array([*_told(rows), *([None] * len(failures))], pa.string()),
        }
    )


def _told(rows: list[MaskedExample]) -> Iterator[str | None]:
    known: dict[Any, str] = {}
    for row in rows:
        if not (any(row.modes) or any(row.changes) or row.unread):
            yield None
            continue
        key = (*row.modes,), (*map(tuple, row.changes),), (*row.unread,)
        if key not in known:
            modes, changes = Counter(filter(None, row.modes)), Counter(chain.from_iterable(row.changes))
            known[key] = json.dumps({"modes": modes, "changes": changes, "unread": Counter(row.unread)})
        yield known[key]


def _absorb(report: MaskReport, records: pa.Table, masker: PromptMasker) -> pa.Table:
    """Count a table of records; returns the rows among them that are to be trained on."""
    code = records["code"]
    failed = records.filter(pa.compute.is_valid(code)).select(["source", "code", "message", "too_long"]).to_pylist()
    for failure in failed:
        report.add_failure(failure["code"], failure["source"], failure["message"], too_long=failure["too_long"])
    rows = records.filter(pa.compute.is_null(code))
    sources = rows["source"].to_numpy()
    ids, offsets = _flat(rows["input_ids"])
    labels, _ = _flat(rows["labels"])
    report.add_rows(sources, ids, labels, offsets, masker.stop_token_names)
    for name in ("repeated_tokens", "lost_tokens"):
        setattr(report, name, getattr(report, name) + int(rows[name].to_numpy().sum()))
    report.lost_supervised_tokens += int(rows["lost_supervised"].to_numpy().sum())
    report.cut_rows += int((rows["lost_tokens"].to_numpy() > 0).sum())
    for told, count in Counter(rows["told"].drop_null().to_pylist()).items():
        report.add_turns(**json.loads(told), times=count)
    if len(sources):
        totals = _flat(rows["roles"])[0].reshape(len(sources), len(ORIGINS)).sum(axis=0)
        for name, count in zip(ORIGINS, totals, strict=True):
            if count:
                report.role_tokens[name] = report.role_tokens.get(name, 0) + int(count)
    return rows.select(["input_ids", "labels"])


def _count_sources(report: MaskReport, records: pa.Table) -> None:
    """Count rows of data that were split or dropped; `records` holds all that was made of each of its sources."""
    failed = pa.compute.is_valid(records["code"]).to_numpy()
    sources = records["source"].to_numpy()
    report.split_rows += int((np.unique(sources[~failed], return_counts=True)[1] > 1).sum())
    report.dropped_rows += len(np.setdiff1d(sources[failed], sources[~failed]))


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Values of a list column and int64 offsets into them, without a Python object per token."""
    lengths = pa.compute.list_value_length(column).to_numpy().astype(np.int64)
    return pa.compute.list_flatten(column).to_numpy(), np.concatenate(([0], np.cumsum(lengths)))


def _read_report(records: Dataset, masker: PromptMasker, *, rows_in: int) -> MaskReport:
    report = MaskReport(rows_in=rows_in, notes=masker.notes)
    prompts: list[np.ndarray] = []
    # What was made of one row of data may lie in two of these slices, so that is counted over all of them.
    _count_sources(report, records.select_columns(["source", "code"])[:])
    for start in range(0, len(records), _BATCH):
        rows = _absorb(report, records[start : start + _BATCH], masker)
        if len(prompts) < PREFIX_ROWS:
            prompts += _prompts(rows.slice(0, PREFIX_ROWS - len(prompts)))
    report.repeated_prefixes = repeated_prefixes(prompts)
    return report


def _prompts(rows: pa.Table) -> list[np.ndarray]:
    """The ids before the first supervised one of each row, as far as the report looks at them."""
    ids, offsets = _flat(rows["input_ids"])
    labels, _ = _flat(rows["labels"])
    starts, trained = offsets[:-1], np.flatnonzero(labels != IGNORE_INDEX)  # of which every row has one
    ends = np.minimum(trained[np.searchsorted(trained, starts)], starts + PREFIX_TOKENS)
    # Copies, as views would keep all of `ids` in memory.
    return [ids[start:end].copy() for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def _mask_stream(dataset: IterableDataset, masker: PromptMasker) -> Masked:
    report = MaskReport(notes=[*masker.notes, "counts cover the rows drawn so far, in this process"])
    dataset = dataset.with_format(None)
    if stored := json_columns(dataset.features):
        dataset = dataset.decode(False)
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if not columns:
        raise MaskingError("the dataset has no rows.", code="empty_dataset", remedy="Check the file and the split.")

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        if stored:
            examples = [with_json_read(example, stored) for example in examples]
        report.rows_in += len(examples)
        report.unread_columns = unread_columns({*report.unread_columns, *batch}, masker.reading)
        records = to_records(masker.encode_batch(examples), indices, masker)
        _count_sources(report, records)
        rows = _absorb(report, records, masker)
        # `remove_columns` names those of the first row; later ones are joined to our rows, so they must be as long.
        return {**{name: [None] * len(rows) for name in batch if name not in columns}, **rows.to_pydict()}

    masked = dataset.map(encode, with_indices=True, batched=True, batch_size=_OF_STREAM, remove_columns=columns)
    masked = masked.select_columns(list(FEATURES)).cast(FEATURES)
    return Masked(masked, report)
