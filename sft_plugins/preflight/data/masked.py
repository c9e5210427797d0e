"""Rows on disk → masked rows on disk, in shards: of any size, and where asked resumable.

mask_rows(source, masker)                    →  Masked(dataset, report); the shards go with the process
mask_rows(source, masker, folder=unfinished) →  the same; shards that an interrupted run left in the folder are not made again

A shard holds what became of `SHARD_ROWS` rows of data, and is there whole or not at all:

    rows 0 … 8,191  →  masked-00000.arrow        rows 8,192 … 10,000  →  masked-00001.arrow
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_plugins._files import whole_or_not_at_all
from sft_plugins.errors import AssetError
from sft_plugins.preflight.data.files import readable, scratch_folder, writing_rows
from sft_plugins.preflight.data.readers import Row
from sft_plugins.preflight.data.source import Source

if TYPE_CHECKING:
    from sft_plugins.masking import Masked, PromptMasker

_BATCH = 256
SHARD_ROWS = 32 * _BATCH
_JOB = "job.json"


def mask_rows(
    source: Source,
    masker: PromptMasker,
    *,
    advance: Callable[[int], None] | None = None,
    folder: Path | None = None,
) -> Masked:
    """`mask_dataset(rows, masker)` for rows of any size and any mixture of columns.

    Args:
        advance: called with the number of rows of each batch that is done.
        folder: where the masked rows are written, as `unfinished_folder` gives it; None for a temporary folder that goes
            with the process.

    Raises:
        MaskingError: as `mask_dataset`; under `errors="drop"` never for a row.
        AssetError: `unwritable` where the folder is full; faults of the data.
    """
    from datasets import Dataset, concatenate_datasets

    from sft_plugins.masking import from_records

    place = scratch_folder() if folder is None else folder
    columns: set[str] = set()
    rows_in = 0
    rows = source.rows()

    def batches() -> Iterator[list[Row]]:
        """The rows of the next shard, some at a time; each is counted once it was used."""
        nonlocal rows_in
        for _ in range(SHARD_ROWS // _BATCH):
            with readable(source.path):
                batch = list(itertools.islice(rows, _BATCH))
            if not batch:
                return
            yield batch
            rows_in += len(batch)
            columns.update(*batch)
            if advance is not None:
                advance(len(batch))

    shards: list[Path] = []
    while rows_in == len(shards) * SHARD_ROWS:
        file = place / f"masked-{len(shards):05d}.arrow"
        if file.is_file():  # of a run that was interrupted: read past its rows
            for _ in batches():
                pass
        else:
            with writing_rows(file, temporary=folder is None):
                _write_shard(file, batches(), rows_in, masker)
        shards.append(file)
    records = concatenate_datasets([Dataset.from_file(str(file)) for file in shards])
    return from_records(records, masker, rows_in=rows_in, columns=columns)


def _write_shard(file: Path, batches: Iterator[list[Row]], begin: int, masker: PromptMasker) -> None:
    from datasets.arrow_writer import ArrowWriter

    from sft_plugins.masking import RECORD, to_records

    with whole_or_not_at_all(file) as draft, ArrowWriter(path=str(draft), features=RECORD) as writer:
        for batch in batches:
            numbers = list(range(begin, begin + len(batch)))
            writer.write_table(to_records(masker.encode_batch(batch), numbers, masker))
            begin += len(batch)
        writer.finalize()


def unfinished_folder(target: Path, job: Mapping[str, Any]) -> Path:
    """The folder beside `target` in which `job` keeps what is done of it, made or found again.

    Args:
        job: facts that decide every masked row, as JSON has them: data, limits, the masker's fingerprint.

    Raises:
        AssetError: `unfinished_output` where another job left its rows there, naming the facts that differ; `unwritable`.
    """
    folder = target.with_name(f".{target.name}.unfinished")
    wanted = json.loads(json.dumps(job))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / _JOB
        if file.is_file() and any(folder.glob("masked-*.arrow")):  # of a run that kept nothing, nothing can be lost
            found = json.loads(file.read_text(encoding="utf-8"))
            differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            if differing:
                raise AssetError(
                    f"{folder} holds the rows of an interrupted run with another {', another '.join(differing)}.",
                    code="unfinished_output",
                    remedy="finish that run with the same command, remove the folder, or write somewhere else.",
                )
        else:
            with whole_or_not_at_all(file) as draft:
                draft.write_text(json.dumps(wanted, indent=2), encoding="utf-8")
    except OSError as error:
        raise AssetError(
            f"{folder} cannot be written: {error.strerror or error}.",
            code="unwritable",
            remedy="make room there, or write to a folder whose parent you can write to.",
        ) from error
    return folder


def data_facts(path: str | Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of change (ns) of the files at `path`: other data is told by them without being read."""
    from sft_plugins.preflight.data.files import home

    place = home(path)
    with readable(path):
        files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
        states = [(file, file.stat()) for file in files]
    return [(str(file.relative_to(place.parent)), state.st_size, state.st_mtime_ns) for file, state in states]
