"""What `inspect`, `audit` and `pack` take alike: their options, and the steps from them to masked rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sft_plugins.cli.output import Output

if TYPE_CHECKING:
    from sft_plugins.masking import Masked, MaskReport, PromptMasker
    from sft_plugins.preflight.data import Source

TrainOn = Literal["all", "last"]
Overflow = Literal["raise", "drop", "truncate", "keep_turns"]
SpecialTokens = Literal["raise", "allow"]

DATA = Annotated[
    str,
    typer.Argument(
        help="A .jsonl, .json, .csv, .parquet or .arrow file, a folder of `save_to_disk`, or Axolotl's "
        "`dataset_prepared_path`.",
        show_default=False,
    ),
]
MODEL = Annotated[str, typer.Option("--model", "-m", help="Whose tokenizer: a folder or a hub id.", show_default=False)]
SPLIT = Annotated[str | None, typer.Option(help="Which split, where a saved folder holds several.")]
LIMIT = Annotated[int | None, typer.Option(min=1, help="Look at the first rows only.")]
TRAIN_ON = Annotated[TrainOn, typer.Option(help="Assistant turns that are trained.")]
MAX_LENGTH = Annotated[int | None, typer.Option(min=2, help="Most tokens of a row.")]
OVERFLOW = Annotated[
    Overflow,
    typer.Option(
        help="What becomes of rows beyond --max-length: refused, dropped, cut, or cut after the last whole turn."
    ),
]
SPECIAL_TOKENS = Annotated[
    SpecialTokens,
    typer.Option("--special-tokens-in-content", help="Whether text of the data may turn into special tokens."),
]


def faults(report: MaskReport, overflow: Overflow) -> dict[str, int]:
    """Failures by code, without those that the overflow policy was told to leave out: they are counted and shown, no more."""
    counts = {
        code: found.count - (0 if overflow == "raise" else found.too_long) for code, found in report.failures.items()
    }
    return {code: count for code, count in counts.items() if count}


@contextmanager
def step(output: Output, words: str) -> Iterator[None]:
    """`words` beside a spinner while something takes its time; nothing where stderr is no terminal."""
    with _progress(output, SpinnerColumn(), TextColumn(words)) as spinner:
        spinner.add_task(words, total=None)
        yield


def mask_with_bar(source: Source, masker: PromptMasker, output: Output) -> Masked:
    """`mask_rows`, with a bar on stderr."""
    from sft_plugins.preflight.data import mask_rows

    dataset = source.dataset()
    rows = TextColumn("{task.completed:,} rows")
    with _progress(output, TextColumn("masking"), BarColumn(bar_width=None), rows, TimeElapsedColumn()) as bar:
        task: TaskID = bar.add_task("masking", total=None if dataset is None else len(dataset))
        return mask_rows(source, masker, advance=lambda rows: bar.advance(task, rows))


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
