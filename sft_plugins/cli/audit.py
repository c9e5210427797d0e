"""`sft-plugins audit`: what masking makes of a data set, or what is wrong with masks that somebody else made."""

from __future__ import annotations

from typing import Any

import typer
from rich.text import Text

from sft_plugins.cli.inputs import (
    DATA,
    LIMIT,
    MAX_LENGTH,
    MODEL,
    OVERFLOW,
    SPECIAL_TOKENS,
    SPLIT,
    TRAIN_ON,
    faults,
    mask_with_bar,
    source_facts,
    source_line,
    step,
)
from sft_plugins.cli.output import EXIT_FINDINGS, JSON, QUIET, Output

_EPILOG = (
    "Examples: sft-plugins audit rows.jsonl --model ./model | sft-plugins audit last_run_prepared -m ./model --json | "
    "sft-plugins audit rows.jsonl -m ./model --max-length 2048 --overflow keep_turns. Exit codes: 0 every row is exact, "
    "1 some are not, 2 unusable input."
)


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(audit)


def audit(
    data: DATA,
    model: MODEL,
    split: SPLIT = None,
    limit: LIMIT = None,
    train_on: TRAIN_ON = "all",
    max_length: MAX_LENGTH = None,
    overflow: OVERFLOW = "raise",
    special_tokens: SPECIAL_TOKENS = "raise",
    quiet: QUIET = False,
    as_json: JSON = False,
) -> None:
    """Check every row: what carries loss, what is refused and why, what is wrong with masks made elsewhere."""
    out = Output(quiet=quiet, as_json=as_json)
    with out.guard():
        from sft_plugins.preflight.data import check_form, open_data

        source = open_data(data, split=split, limit=limit)
        check_form(source)
        with step(out, "loading the tokenizer"):
            from sft_plugins.masking import PromptMasker
            from sft_plugins.preflight.documents import check_documents
            from sft_plugins.preflight.models import load_tokenizer

            tokenizer = load_tokenizer(model)
            masker = PromptMasker(
                tokenizer, train_on=train_on, errors="drop", max_length=max_length, overflow=overflow,
                special_tokens_in_content=special_tokens,
            )  # fmt: skip
        if source.kind == "raw":
            report = mask_with_bar(source, masker, out).report
        else:
            with step(out, "checking masks"):
                report = check_documents(source.rows(), tokenizer)
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
    if found:
        raise typer.Exit(EXIT_FINDINGS)


def advice(found: dict[str, int], unit: str) -> list[Text]:
    """A line on each fault: how many rows (or documents, the `unit`), and what to do about them."""
    from sft_plugins.preflight.words import REMEDIES

    if not found:
        return [Text("every row is masked exactly", "bold green")]
    lines = []
    for code, count in sorted(found.items(), key=lambda item: -item[1]):
        pieces: list[Any] = [(f"{code}: ", "bold red"), f"{count:,} {unit if count == 1 else unit + 's'}. "]
        lines.append(Text.assemble(*pieces, REMEDIES.get(code, "")))
    return lines
