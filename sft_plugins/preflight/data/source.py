"""Data as it lies on disk: files of rows, saved data sets, folders that trainers prepared. Read as a stream, of any size.

open_data("rows.jsonl")  →  Source(kind="raw", format="JSON Lines")        .rows()  one dict at a time
open_data("prepared/")   →  Source(kind="tokenised", format="Axolotl …")   .dataset()  where it lies in Arrow already
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_plugins.errors import AssetError
from sft_plugins.preflight.data.documents import Kind, kind_of
from sft_plugins.preflight.data.files import (
    home,
    no_scratch,
    readable,
    refuse_wide_text,
    scratch_folder,
)
from sft_plugins.preflight.data.readers import Row, csv_rows, json_rows

if TYPE_CHECKING:
    from datasets import Dataset


_LOOKED_AT = 20  # rows in which a row form must show
_FORMATS = ".jsonl, .json, .csv, .parquet, .arrow, or a folder that `save_to_disk` or Axolotl wrote"


@dataclass(frozen=True)
class Source:
    """Rows on disk.

    Attributes:
        path: as given.
        kind: `raw` rows to mask; `tokenised` rows with `input_ids` that somebody masked; `packed` ones of several documents.
        format: in words, "JSON Lines".
        notes: what a reader should know about how it was read.
    """

    path: str
    kind: Kind
    format: str
    notes: tuple[str, ...] = ()
    _open: Callable[[], Iterator[Row]] = field(default=lambda: iter(()), repr=False, compare=False)
    _dataset: Any = field(default=None, repr=False, compare=False)

    def rows(self) -> Iterator[Row]:
        """The rows, one at a time; memory is bounded by the largest of them."""
        return self._open()

    def dataset(self) -> Dataset | None:
        """The rows as a `datasets.Dataset` where they lie in Arrow already, else None."""
        dataset: Dataset | None = self._dataset
        return dataset

    def count(self) -> int:
        """How many rows there are; a text file is read to know."""
        return sum(1 for _ in self.rows()) if self._dataset is None else len(self._dataset)

    def select(self, indices: Iterable[int]) -> Source:
        """The rows of these numbers, in the order of the file."""
        kept = sorted(set(indices))
        if self._dataset is not None:
            dataset = self._dataset.select(kept)
            return replace(self, _open=lambda: iter(dataset), _dataset=dataset)
        opened, wanted = self._open, set(kept)
        end = kept[-1] + 1 if kept else 0
        rows = lambda: (row for i, row in enumerate(itertools.islice(opened(), end)) if i in wanted)  # noqa: E731
        return replace(self, _open=rows)

    def first(self, count: int) -> Source:
        """The first rows."""
        return self.select(range(count if self._dataset is None else min(count, len(self._dataset))))

    def map(self, function: Callable[[Row], Mapping[str, Any]]) -> Source:
        """The same rows, each through `function`: columns renamed, parts taken out. No longer a data set in Arrow."""
        opened = self._open
        rows = lambda: (dict(function(row)) for row in opened())  # noqa: E731 - opened anew at each reading
        first = next(rows(), {})
        return replace(self, kind=kind_of(first), _open=rows, _dataset=None)


def open_data(path: str | Path, *, split: str | None = None, limit: int | None = None) -> Source:
    """The rows at `path`; the first is read, to see what they are.

    Args:
        path: a file (.jsonl, .json as an array or as lines, .csv, .parquet, .arrow), a folder of `save_to_disk`, or
            Axolotl's `dataset_prepared_path`, whose saved data set lies one level down.
        split: which, where a saved folder holds several; with a slice behind it (`train[:500]`, `train[10%:]`) of a file.
        limit: read the first rows only.

    Raises:
        AssetError: `missing_file`, `unreadable`, `no_rows`, `bad_data`, and `bad_jsonl` with line and column.
    """
    place = home(path)
    with readable(path):
        if not place.exists():
            raise AssetError(
                f"{path}: there is no such file or folder.",
                code="missing_file",
                remedy=f"give {_FORMATS}; data of the hub is downloaded first.",
            )
        source = _open_folder(place, split) if place.is_dir() else _sliced(_open_file(place), split)
    if limit is not None:
        source = (
            source.select(range(limit))
            if source.dataset() is None
            else source.select(range(min(limit, source.count())))
        )
    first = next(source.rows(), None)
    if first is None:
        raise AssetError(f"{path} holds no rows.", code="no_rows", remedy="check how it was written, and the split.")
    return replace(source, path=str(path), kind=kind_of(first))


def check_form(source: Source) -> None:
    """Refuse data in whose first rows no known row form shows; single bad rows among good ones are the audit's.

    Raises:
        AssetError: `bad_schema`, naming the columns found and those that are taken.
    """
    from sft_plugins.errors import MaskingError
    from sft_plugins.masking import Reading, known_form, parse_example

    for row in itertools.islice(source.rows(), _LOOKED_AT):
        if known_form(row):
            return
        try:
            parse_example(row, Reading())
        except MaskingError as error:
            told = error
    raise AssetError(f"{source.path}: {told.message}", code="bad_schema", remedy=told.remedy)


def _open_file(path: Path) -> Source:
    with path.open("rb") as file:
        magic = file.read(8)
    if magic.startswith(b"PAR1"):
        return _parquet(path)
    if path.suffix in (".arrow", ".feather") or magic.startswith(b"ARROW1"):
        return _arrow(path)
    if not magic:
        raise AssetError(f"{path} is empty.", code="no_rows", remedy="check how it was written.")
    refuse_wide_text(path, magic)
    if b"\0" in magic or magic.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
        raise AssetError(
            f"{path} is a binary file that begins with {magic!r}.",
            code="bad_data",
            remedy=f"unpack it if it is compressed; what is read is {_FORMATS}.",
        )
    if path.suffix in (".csv", ".tsv"):
        return Source(str(path), "raw", "CSV", _open=lambda: csv_rows(path))
    form = "JSON Lines" if path.suffix != ".json" else "JSON"
    return Source(str(path), "raw", form, _open=lambda: json_rows(path))


def _parquet(path: Path) -> Source:
    from datasets import Dataset

    folder = scratch_folder()
    dataset = _arrow_errors(path, lambda: Dataset.from_parquet(str(path), cache_dir=str(folder)))
    return _of_dataset(path, dataset, "Parquet")


def _arrow(path: Path) -> Source:
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    def read() -> Any:
        mapped = pa.memory_map(str(path))
        if mapped.read(6) == b"ARROW1":  # the file format (Feather); datasets reads the stream format
            mapped.seek(0)
            return Dataset(InMemoryTable(pa.ipc.open_file(mapped).read_all()))
        return Dataset.from_file(str(path))

    return _of_dataset(path, _arrow_errors(path, read), "Arrow")


def _arrow_errors(path: Path, read: Callable[[], Any]) -> Any:
    import pyarrow as pa
    from datasets.exceptions import DatasetGenerationError

    try:
        return read()
    except OSError as error:  # Parquet is unpacked into a scratch folder
        if error.errno == errno.ENOSPC:
            raise no_scratch(error, f"{path}: ") from error
        raise
    except (pa.ArrowException, DatasetGenerationError, ValueError, KeyError, TypeError) as error:
        cause = error.__cause__ or error
        raise AssetError(
            f"{path} cannot be read: {' '.join(str(cause).split())[:300]}",
            code="bad_data",
            remedy="write it again; it is damaged, or was written by an unknown version.",
        ) from error


def _open_folder(path: Path, split: str | None) -> Source:
    from datasets import load_from_disk

    if (path / "dataset_dict.json").is_file():
        splits = _arrow_errors(path, lambda: load_from_disk(str(path)))
        name = split if split is not None else next(iter(splits)) if len(splits) == 1 else None
        if name not in splits:
            problem = "holds several splits" if split is None else f"has no split {split!r}"
            raise AssetError(
                f"{path} {problem}: {', '.join(splits)}.", code="bad_data", remedy="name one of them with --split."
            )
        return _of_dataset(path, splits[name], f"saved dataset, split {name}")
    if (path / "state.json").is_file():
        return _of_dataset(path, _arrow_errors(path, lambda: load_from_disk(str(path))), "saved dataset")
    # Axolotl writes <dataset_prepared_path>/<hash>/; this library's plug-in sft_plugins-<hash>/<hash>/ below it.
    states = [*path.glob("*/state.json"), *path.glob("sft_plugins-*/*/state.json")]
    if not states:
        names = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
        raise AssetError(
            f"{path} holds no saved data set; it holds {names}.",
            code="bad_data",
            remedy=f"give a file in it, or {_FORMATS}.",
        )
    newest = max(states, key=lambda state: state.stat().st_mtime).parent
    others = len(states) - 1
    notes = (f"of {len(states)} prepared data sets the newest is read: {newest.name}",) if others else ()
    dataset = _arrow_errors(newest, lambda: load_from_disk(str(newest)))
    return replace(_of_dataset(path, dataset, "Axolotl prepared"), notes=notes)


def _of_dataset(path: Path, dataset: Any, form: str) -> Source:
    return Source(str(path), "raw", form, _open=lambda: iter(dataset), _dataset=dataset)


def _sliced(source: Source, split: str | None) -> Source:
    """The part of a file that `split` names: a file is one split, `train`, as `datasets` has it."""
    from datasets import ReadInstruction

    name, bracket, _ = (split or "").partition("[")
    if name not in ("", "train"):
        raise AssetError(
            f"{source.path} has no split {name!r}: a file is one split, train.",
            code="bad_data",
            remedy="name `train`, a part of it (`train[:500]`), or give a saved dataset that has this split.",
        )
    if not bracket:
        return source
    count = source.count()
    try:
        parts = ReadInstruction.from_spec(str(split)).to_absolute({"train": count})
    except (ValueError, AssertionError, KeyError) as error:
        raise AssetError(
            f"{source.path}: `split: {split}` names no part of its {count:,} rows: {error}.",
            code="bad_data",
            remedy="write it as `train[:500]`, `train[10%:20%]` or `train[-100:]`.",
        ) from error
    return source.select(itertools.chain(*(range(part.from_, min(part.to, count)) for part in parts)))
