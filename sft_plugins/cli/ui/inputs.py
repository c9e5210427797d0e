"""What `inspect`, `audit` and `pack` do alike: the steps from their options to masked rows, and what they say of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sft_plugins._options import Overflow, Reasoning, SpecialTokens, Thinking, TrainOn, words
from sft_plugins.cli.ui.output import Output

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
    output: Output,
    model: str,
    *,
    train_on: TrainOn,
    special_tokens: str,
    thinking: Thinking,
    reasoning: Reasoning,
    role: list[str] | None,
    ignore_column: list[str] | None,
    max_length: int | None,
    overflow: Overflow,
) -> PromptMasker:
    """`PromptMasker` with the tokenizer of `model`. Rows that it refuses are dropped and counted, not raised."""
    with step(output, "loading the tokenizer"):
        from sft_plugins.masking import PromptMasker
        from sft_plugins.preflight import load_tokenizer

        roles = {name: meaning for name, _, meaning in (one.partition("=") for one in role or ())}
        return PromptMasker(
            load_tokenizer(model), train_on=train_on, errors="drop",
            special_tokens_in_content=special_tokens if special_tokens in words(SpecialTokens) else special_tokens.split(","),
            thinking=thinking, reasoning=reasoning, max_length=max_length, overflow=overflow,
            roles=roles, ignore_columns=ignore_column or (),
        )  # fmt: skip


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
    from sft_plugins.preflight import mask_rows

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
