"""`sft-plugins pack`: what packing does to a data set and to training on it, and the packed data set itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from sft_plugins._files import whole_or_not_at_all
from sft_plugins._options import Overflow
from sft_plugins.cli.ui import options
from sft_plugins.cli.ui.command import add_command
from sft_plugins.cli.ui.inputs import (
    check_new_folder,
    fact_table,
    faults,
    load_masker,
    mask_with_bar,
    open_rows,
    refuse_nothing_left,
    refuse_packed,
    source_facts,
    source_line,
    step,
)
from sft_plugins.cli.ui.output import EXIT_FINDINGS, EXIT_OK, Output

if TYPE_CHECKING:
    from sft_plugins.masking import MaskReport
    from sft_plugins.packing import PackReport

_EPILOG = (
    "Examples: sft-plugins pack rows.jsonl --model ./model --max-length 2048 | sft-plugins pack rows.jsonl -m ./model "
    "--max-length 4096 --overflow keep_turns --output packed. Exit codes: 0, 1 if rows could not be masked and were left "
    "out, 2 unusable input."
)


def register(app: typer.Typer) -> None:
    add_command(app, pack, epilog=_EPILOG)


def pack(
    out: Output,
    *,
    data: options.DATA,
    model: options.MODEL,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens that a packed row has room for.", show_default=False)],
    overflow: Annotated[
        Overflow,
        typer.Option(help="What becomes of longer rows: refused, dropped, cut, or cut after the last whole turn."),
    ] = "drop",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per device and step.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Gradient accumulation steps.")] = 1,
    world: Annotated[int, typer.Option(min=1, help="Devices that train side by side.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="Save the packed data set here (save_to_disk); a new or empty folder.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Shuffles documents of equal length, and the rows.")] = 0,
    split: options.SPLIT = None,
    limit: options.LIMIT = None,
    masking: options.Masking,
) -> int:
    """See what packing saves and what it changes for training; with --output, save the packed rows."""
    from sft_plugins.cli.ui.histogram import bins

    if output is not None:
        check_new_folder(output)  # before minutes of work whose result could not be kept
    source = open_rows(data, split=split, limit=limit)
    refuse_packed(source.kind, data)
    keeps_turns = overflow == "keep_turns"  # the masker knows turns; what the others cost the packer says best
    limits: dict[str, Any] = {"max_length": max_length, "overflow": overflow} if keeps_turns else {}
    masker = load_masker(out, model, masking, **limits)
    masked, made = mask_with_bar(source, masker, out)
    refuse_nothing_left(made, data)
    with step(out, "packing"):
        from sft_plugins.packing import TokenColumn, pack_dataset

        lengths = TokenColumn.of(masked, "input_ids").length
        policy = "raise" if keeps_turns else overflow
        packed, report = pack_dataset(masked, max_length, overflow=policy, seed=seed)
    steps = (batch_size, accumulation, world)
    show(source_line(source, model), report, made, lengths, steps=steps, overflow=overflow, out=out)
    if output is not None:
        with step(out, "saving"), whole_or_not_at_all(output) as draft:
            packed.save_to_disk(str(draft))
        out.console.print(Text(f"saved {len(packed):,} packed rows to {output}", "bold"))
    training = report.training(batch_size, gradient_accumulation_steps=accumulation, world_size=world)
    out.emit(
        {
            "command": "pack",
            "data": source_facts(source),
            "model": model,
            "report": report.to_dict(),
            "training": training,
            "masking": made.to_dict(),
            "lengths": [
                {"from": low, "to": high, "documents": count} for low, high, count in bins(lengths, limit=max_length)
            ],
            "output": output,
        }
    )
    return EXIT_FINDINGS if faults(made, overflow) else EXIT_OK


def show(
    source: Text,
    report: PackReport,
    masking: MaskReport,
    lengths: Any,
    *,
    steps: tuple[int, int, int],
    overflow: Overflow,
    out: Output,
) -> None:
    """The report for people: facts, then the histogram, then what was lost."""
    from sft_plugins.cli.ui.histogram import histogram
    from sft_plugins.packing import LOSSES

    console = out.console
    console.print(source)
    table = fact_table(f"Packed to rows of {report.max_length:,} tokens")
    for name, words in facts(report, masking, steps):
        table.add_row(Text(name, "bold"), Text(words))
    console.print(table)
    for kind, loss in report.lost.items():
        rows = ", ".join(map(str, loss.first_rows)) + (", …" if loss.rows > len(loss.first_rows) else "")
        words = f"{loss.rows:,} rows {LOSSES[kind]}: {loss.tokens:,} tokens lost, {loss.supervised_tokens:,} of them trained"
        console.print(Text.assemble((f"{kind}: ", "bold yellow"), f"{words} (masked rows {rows})."))
    refused = faults(masking, overflow)
    for code, found in masking.failures.items():
        rows = ", ".join(map(str, found.first_rows)) + (", …" if found.count > len(found.first_rows) else "")
        style = "bold red" if code in refused else "bold yellow"
        left_out = f"{found.count:,} {'row' if found.count == 1 else 'rows'} left out (rows {rows})"
        console.print(Text.assemble((f"{code}: ", style), f"{left_out}: {found.example}"))
    console.print()
    console.print(Text("Tokens per document" + (", once cut" if masking.cut_rows else ""), "bold"))
    console.print(histogram(lengths, console, limit=report.max_length), no_wrap=True, overflow="ignore", crop=False)


def facts(report: PackReport, masking: MaskReport, steps: tuple[int, int, int]) -> list[tuple[str, str]]:
    """Names and what they come to."""
    batch_size, accumulation, world = steps
    training = report.training(batch_size, gradient_accumulation_steps=accumulation, world_size=world)
    above = report.rows_above_bound / max(report.lower_bound, 1)
    tokens = max(report.tokens, 1)
    per_step = f"{batch_size} × {accumulation} × {world} = {training.rows_per_step} rows"
    lines = [
        ("documents", f"{report.documents:,} of {masking.rows_in:,} rows, the longest {report.longest:,} tokens"),
        ("packed rows", f"{report.rows:,}, {report.documents / max(report.rows, 1):.1f} documents each"),
        ("fill", f"{report.fill:.2%}; {report.tokens:,} tokens, {report.supervised_share:.1%} of them trained"),
        (
            "bound",
            f"no packing has fewer than {report.lower_bound:,} rows: {report.rows_above_bound:,} above it ({above:.2%})",
        ),
    ]
    if masking.cut_rows:
        lost = f"{masking.lost_tokens:,} tokens, {masking.lost_supervised_tokens:,} of them trained"
        lines.append(("cut", f"{masking.cut_rows:,} rows after their last whole turn: {lost}"))
    batch = min(report.padded, key=lambda size: abs(size - batch_size), default=None)
    if batch is not None:
        lines.append(("padded instead", f"{report.padded[batch] / tokens:.2f}× the tokens, in batches of {batch}"))
    lines += [
        ("", f"{report.padded_to_max_length / tokens:.2f}× the tokens, each to {report.max_length:,}"),
        ("steps per epoch", f"{training.steps_before:,} → {training.steps_after:,}, at {per_step} each"),
        (
            "per step",
            f"{training.documents_per_step_before:,.0f} → {training.documents_per_step_after:,.0f} documents, "
            f"{training.tokens_per_step_before:,.0f} → {training.tokens_per_step_after:,.0f} tokens",
        ),
        (
            "same step size",
            f"{training.rows_per_step_for_same_documents} packed rows per step, or retune the learning rate",
        ),
    ]
    return lines
