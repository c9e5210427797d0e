"""`sft-plugins mask`: rows masked exactly, and packed where asked, written in the layout that a trainer reads."""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from sft_plugins.cli.ui import options
from sft_plugins.cli.ui.command import add_command
from sft_plugins.cli.ui.inputs import (
    bar,
    check_new_folder,
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
from sft_plugins.errors import AssetError

if TYPE_CHECKING:
    from sft_plugins.masking import PromptMasker

Host = Literal["trl", "llamafactory", "swift", "unsloth", "verl", "parquet"]
_EPILOG = (
    "Examples: sft-plugins mask rows.jsonl --model ./model --output masked --to llamafactory | sft-plugins mask rows.jsonl "
    "-m ./model --output packed --pack 4096 --overflow keep_turns. A run that was interrupted goes on with the same command. "
    "Exit codes: 0, 1 if rows could not be masked and were left out, 2 unusable input."
)


def register(app: typer.Typer) -> None:
    add_command(app, mask, epilog=_EPILOG)


def mask(
    out: Output,
    *,
    data: options.DATA,
    model: options.MODEL,
    output: Annotated[
        Path, typer.Option(help="Where the rows are written; a new or empty folder.", show_default=False)
    ],
    to: Annotated[Host, typer.Option(help="Whose layout the rows get.")] = "trl",
    pack: Annotated[
        int | None, typer.Option(min=2, help="Pack the rows to this many tokens (trl, swift, parquet).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Shuffles packed documents of equal length, and packed rows.")] = 0,
    split: options.SPLIT = None,
    limit: options.LIMIT = None,
    max_length: options.MAX_LENGTH = None,
    overflow: options.OVERFLOW = "raise",
    masking: options.Masking,
) -> int:
    """Mask rows exactly and write them as a trainer reads them, with a manifest and the lines that make it use them."""
    from sft_plugins.integrations import Manifest, layout_of, write_rows
    from sft_plugins.packing import pack_dataset
    from sft_plugins.preflight import data_facts, home, unfinished_folder, versions, writing_rows

    layout = layout_of(to, packed=pack is not None)
    if pack is not None and max_length is not None and max_length > pack:
        raise AssetError(
            f"--max-length {max_length} lets through rows that --pack {pack} has no room for.",
            code="bad_option",
            remedy="leave --max-length out: packed rows limit it.",
        )
    output = output.resolve()  # `.`, and a link to a folder, too
    check_new_folder(output)  # before hours of work whose result could not be kept
    source = open_rows(data, split=split, limit=limit)
    refuse_packed(source.kind, data)
    masker = load_masker(out, model, masking, max_length=max_length or pack, overflow=overflow)
    fingerprint = masker.fingerprint()
    job = {
        "data": data_facts(data), "split": split, "limit": limit, "tokenizer, template or option": fingerprint
    }  # fmt: skip
    unfinished = unfinished_folder(output, job)
    masked, report = mask_with_bar(source, masker, out, folder=unfinished)
    if not report.rows_out:
        shutil.rmtree(unfinished, ignore_errors=True)  # so that other options find no other job's rows
    refuse_nothing_left(report, data)
    # A folder is named by its whole path: the trainer is started somewhere else.
    named = str(home(model).resolve()) if home(model).is_dir() else model
    with writing_rows(output, temporary=False):
        packing = None
        if pack is not None:
            with step(out, "packing"):
                masked, packing = pack_dataset(masked, pack, seed=seed)
        facts: dict[str, Any] = {
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "data": {**source_facts(source), "files": job["data"], "split": split, "limit": limit},
            "tokenizer": tokenizer_facts(masker, model),
            "masking": fingerprint,
            "options": options_of(masker),
            "pack": pack,
            "seed": seed if pack else None,
            "report": report.to_dict(),
            "packing": packing and packing.to_dict(),
            "versions": versions(),
        }
        with bar(out, "writing", total=len(masked)) as advance:
            written = write_rows(
                masked, output, layout, Manifest(facts=facts, model=named), packed=pack is not None, advance=advance
            )
    shutil.rmtree(unfinished, ignore_errors=True)
    out.console.print(source_line(source, model))
    out.console.print(report)
    unit = "packed rows" if pack else "rows"
    out.console.print(Text(f"saved {written['rows']:,} {unit} for {layout.host} to {output}", "bold"))
    out.console.print(Text((output / layout.file).read_text(encoding="utf-8"), "cyan"))
    out.emit({"command": "mask", "model": model, "output": output, "use": output / layout.file, **written})
    return EXIT_FINDINGS if faults(report, overflow) else EXIT_OK


def options_of(masker: PromptMasker) -> dict[str, Any]:
    """What the masker was told, as JSON has it."""
    from dataclasses import asdict

    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(masker.options).items()}


def tokenizer_facts(masker: PromptMasker, model: str) -> dict[str, Any]:
    """Which tokenizer and template the rows are for, by name and by hash."""
    from sft_plugins.masking import TextTokenizer

    tokenizer = masker.tokenizer
    return {
        "model": model,
        "class": type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "vocabulary_sha256": _sha256(json.dumps(sorted(tokenizer.get_vocab().items()))),
        "sha256": _sha256(TextTokenizer(tokenizer).definition()),
        "chat_template_sha256": _sha256(str(tokenizer.chat_template)) if tokenizer.chat_template else None,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
