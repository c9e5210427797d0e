"""`sft-plugins audit`: what masking makes of a data set, or what is wrong with masks that somebody else made."""

from __future__ import annotations

from typing import Any

import typer
from rich.text import Text

from sft_plugins.cli.ui import options
from sft_plugins.cli.ui.command import add_command
from sft_plugins.cli.ui.inputs import faults, load_masker, mask_with_bar, open_rows, source_facts, source_line, step
from sft_plugins.cli.ui.output import EXIT_FINDINGS, EXIT_OK, Output

_EPILOG = (
    "Examples: sft-plugins audit rows.jsonl --model ./model | sft-plugins audit last_run_prepared -m ./model --json | "
    "sft-plugins audit rows.jsonl -m ./model --max-length 2048 --overflow keep_turns. Exit codes: 0 every row is exact, "
    "1 some are not, 2 unusable input."
)


def register(app: typer.Typer) -> None:
    add_command(app, audit, epilog=_EPILOG)


def audit(
    out: Output,
    *,
    data: options.DATA,
    model: options.MODEL,
    split: options.SPLIT = None,
    limit: options.LIMIT = None,
    max_length: options.MAX_LENGTH = None,
    overflow: options.OVERFLOW = "raise",
    masking: options.Masking,
) -> int:
    """Check every row: what carries loss, what is refused and why, what is wrong with masks made elsewhere."""
    source = open_rows(data, split=split, limit=limit)
    masker = load_masker(out, model, masking, max_length=max_length, overflow=overflow)
    if source.kind == "raw":
        report = mask_with_bar(source, masker, out).report
    else:
        with step(out, "checking masks"):
            from sft_plugins.masking import check_masks
            from sft_plugins.preflight import with_lengths

            report = check_masks(map(with_lengths, source.rows()), masker.tokenizer)
    found = faults(report, overflow)
    out.console.print(source_line(source, model))
    out.console.print(report)
    for line in advice(found, "document" if source.kind == "packed" else "row"):
        out.console.print(line)
    out.emit(
        {
            "command": "audit",
            "data": source_facts(source),
            "model": model,
            "ok": not found,
            "faults": list(found),
            "report": report.to_dict(),
        }
    )
    return EXIT_FINDINGS if found else EXIT_OK


def advice(found: dict[str, int], unit: str) -> list[Text]:
    """A line on each fault: how many rows (or documents, the `unit`), and what to do about them."""
    from sft_plugins.preflight import REMEDIES

    if not found:
        return [Text("every row is masked exactly", "bold green")]
    lines = []
    for code, count in sorted(found.items(), key=lambda item: -item[1]):
        pieces: list[Any] = [(f"{code}: ", "bold red"), f"{count:,} {unit if count == 1 else unit + 's'}. "]
        lines.append(Text.assemble(*pieces, REMEDIES.get(code, "")))
    return lines
