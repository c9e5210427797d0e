"""What `inspect`, `audit`, `pack` and `mask` do alike: from their options to masked rows, and what is said of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sft_plugins._options import Overflow
from sft_plugins.cli.ui.options import Masking
from sft_plugins.cli.ui.output import Output
from sft_plugins.errors import AssetError

if TYPE_CHECKING:
    from sft_plugins.masking import Masked, MaskReport, PromptMasker
    from sft_plugins.preflight import Source


def open_rows(data: str, *, split: str | None, limit: int | None = None) -> Source:
    """`open_data`, and in its first rows a row form that is known."""
    from sft_plugins.preflight import check_form, open_data

    source = open_data(data, split=split, limit=limit)
    check_form(source)
    return source


def load_masker(
    output: Output, model: str, masking: Masking, *, max_length: int | None = None, overflow: Overflow = "raise"
) -> PromptMasker:
    """`PromptMasker` with the tokenizer of `model`. Rows that it refuses are dropped and counted, not raised."""
    with step(output, "loading the tokenizer"):
        from sft_plugins.masking import PromptMasker
        from sft_plugins.preflight import load_tokenizer

        tokenizer = load_tokenizer(model)
        return PromptMasker(tokenizer, errors="drop", max_length=max_length, overflow=overflow, **masking.options())


def refuse_packed(kind: str, data: str) -> None:
    """Raises: AssetError: `already_packed`."""
    if kind == "packed":
        raise AssetError(
            f"{data} is packed already.",
            code="already_packed",
            remedy="pack the rows that it was made from; `sft-plugins inspect` shows its documents.",
        )


def refuse_nothing_left(masking: MaskReport, data: str) -> None:
    """Raises: AssetError: `empty_dataset`."""
    if not masking.rows_out:
        found = ", ".join(f"{code} in {failure.count:,} rows" for code, failure in masking.failures.items())
        raise AssetError(
            f"{data}: no row is left: {found}.",
            code="empty_dataset",
            remedy="`sft-plugins audit` says what is wrong with them.",
        )


def faults(report: MaskReport, overflow: Overflow) -> dict[str, int]:
    """Failures by code, without those that the overflow policy was told to leave out: they are counted and shown, no more."""
    counts = {
        code: found.count - (0 if overflow == "raise" else found.too_long) for code, found in report.failures.items()
    }
    return {code: count for code, count in counts.items() if count}


def check_new_folder(folder: Path) -> None:
    """Make sure that `folder` can be written, and holds nothing that would be lost.

    Raises:
        AssetError: `output_exists`, `unwritable`.
    """
    with _writing(folder):
        if folder.resolve() == Path.cwd():  # the folder is replaced, and you would be left in one that is gone
            raise AssetError(
                f"--output {folder} is the folder that you are in.",
                code="output_exists",
                remedy="name a new folder in it.",
            )
        if folder.is_dir() and any(folder.iterdir()):
            raise AssetError(
                f"--output {folder} exists and is not empty.",
                code="output_exists",
                remedy="choose a new folder, or empty it yourself: nothing is overwritten.",
            )
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Make `folder`, and see that files can be written there.

    Raises:
        AssetError: `unwritable`.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AssetError(
            f"--output {folder} cannot be written: {error.strerror or error}.",
            code="unwritable",
            remedy="choose a folder that you can write to.",
        ) from error


@contextmanager
def step(output: Output, words: str) -> Iterator[None]:
    """`words` beside a spinner while something takes its time; nothing where stderr is no terminal."""
    with _progress(output, SpinnerColumn(), TextColumn(words)) as spinner:
        spinner.add_task(words, total=None)
        yield


def mask_with_bar(source: Source, masker: PromptMasker, output: Output, *, folder: Path | None = None) -> Masked:
    """`mask_rows`, with a bar on stderr."""
    from sft_plugins.preflight import mask_rows

    dataset = source.dataset()
    with bar(output, "masking", total=None if dataset is None else len(dataset)) as advance:
        return mask_rows(source, masker, advance=advance, folder=folder)


@contextmanager
def bar(output: Output, words: str, *, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar of rows on stderr; gives the function that moves it on."""
    rows = TextColumn("{task.completed:,} rows")
    with _progress(output, TextColumn(words), BarColumn(bar_width=None), rows, TimeElapsedColumn()) as progress:
        task = progress.add_task(words, total=total)
        yield lambda count: progress.advance(task, count)


def _progress(output: Output, *columns: ProgressColumn) -> Progress:
    console = output.progress
    # Libraries loaded meanwhile may keep sys.stdout for good, so it is not replaced.
    return Progress(
        *columns, console=console, transient=True, disable=not console.is_interactive, redirect_stdout=False,
        redirect_stderr=False,
    )  # fmt: skip


def source_facts(source: Source) -> dict[str, Any]:
    """What was read, for --json."""
    return {"path": source.path, "kind": source.kind, "format": source.format, "notes": list(source.notes)}


def source_line(source: Source, model: str) -> Text:
    """What was read, for people."""
    kinds = {"raw": "raw rows", "tokenised": "rows already tokenised", "packed": "packed rows"}
    lines = [f"{source.path} ({source.format}, {kinds[source.kind]}), tokenizer of {model}", *source.notes]
    return Text("\n".join(lines), style="bold")


def fact_table(title: str) -> Table:
    """A table of names and facts without borders, which a narrow terminal folds and a pipe can read line by line."""
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
