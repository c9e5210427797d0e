"""`sft-plugins inspect`: rows as they will be trained, token by token, in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from sft_plugins.cli.ui import options
from sft_plugins.cli.ui.command import add_command
from sft_plugins.cli.ui.inputs import load_masker, open_rows, source_facts, source_line
from sft_plugins.cli.ui.output import EXIT_FINDINGS, EXIT_OK, Output
from sft_plugins.cli.ui.render import NAMES, has_colour, legend, marked_tokens, printable
from sft_plugins.errors import AssetError

if TYPE_CHECKING:
    from sft_plugins.cli.ui.rows import ShownRow
    from sft_plugins.preflight import Source

_EPILOG = (
    "Examples: sft-plugins inspect rows.jsonl --model ./model | sft-plugins inspect rows.jsonl -m ./model --row 12 | "
    "sft-plugins inspect packed/ -m ./model --html rows.html. Exit codes: 0, 1 if a row shown is refused "
    "(other than for its length, as --overflow asks) or badly masked, "
    "2 unusable input."
)
ROWS, ROWS_OF_A_PAGE, TOKENS = 3, 20, 300


def register(app: typer.Typer) -> None:
    add_command(app, inspect, epilog=_EPILOG)


def inspect(
    out: Output,
    *,
    data: options.DATA,
    model: options.MODEL,
    row: Annotated[
        list[int] | None, typer.Option(min=0, help="Show this row, counted from 0, whole. May be given several times.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help=f"Show the first rows. [default: {ROWS}, on a page {ROWS_OF_A_PAGE}]")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=0, help="Most tokens shown of a row in the terminal, without --row; 0 for all.")
    ] = TOKENS,
    html: Annotated[Path | None, typer.Option(help="Write the rows as a page to this file instead.")] = None,
    split: options.SPLIT = None,
    max_length: options.MAX_LENGTH = None,
    overflow: options.OVERFLOW = "raise",
    masking: options.Masking,
) -> int:
    """See rows as they will be trained: which tokens carry loss, turn by turn, document by document."""
    source = open_rows(data, split=split)
    masker = load_masker(out, model, masking, max_length=max_length, overflow=overflow)
    from sft_plugins.cli.ui.rows import RowReader

    reader = RowReader(masker)
    first = count or (ROWS_OF_A_PAGE if html else ROWS)
    wanted = pick(source, sorted(set(row))) if row else enumerate(islice(source.rows(), first))
    shown = [part for number, fields in wanted for part in reader.read(fields, number)]
    out.console.print(source_line(source, model))
    if html is not None:
        write_html(html, shown, source, model)
        out.console.print(f"wrote {html}")
    else:
        show(shown, out.console, most=None if row or not tokens else tokens)
    out.emit({"command": "inspect", "data": source_facts(source), "model": model, "rows": list(map(as_data, shown))})
    refused = any(not fault.asked_for for part in shown for fault in part.faults)
    return EXIT_FINDINGS if refused else EXIT_OK


def pick(source: Source, wanted: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by number.

    Raises:
        AssetError: `no_such_row`, saying how many there are.
    """
    dataset = source.dataset()
    seen, left = 0, set(wanted)
    if dataset is not None:
        seen = len(dataset)
        for number in wanted:
            if number < seen:
                left.discard(number)
                yield number, dataset[number]
    else:
        for number, row in enumerate(source.rows()):
            seen = number + 1
            if number in left:
                left.discard(number)
                yield number, row
            if not left:
                return
    if left:
        raise AssetError(
            f"{source.path} has no row {min(left)}: it holds {seen:,}.",
            code="no_such_row",
            remedy=f"rows are counted from 0: give --row 0 to {seen - 1}.",
        )


def show(shown: list[ShownRow], console: Console, *, most: int | None) -> None:
    """Each row under a heading, each turn on a line of its own."""
    colour = has_colour(console)
    present = {kind for part in shown for kind in part.kinds}
    console.print(legend(colour=colour, kinds=[kind for kind in NAMES if kind in present]))
    for part in shown:
        console.print()
        console.print(Text(heading(part), "bold"))
        for fault in part.faults:
            style = "bold yellow" if fault.asked_for else "bold red"
            console.print(Text.assemble((f"{fault.code}: ", style), fault.message))
            if fault.remedy:
                console.print(Text.assemble(("what to do: ", "bold"), fault.remedy))
        documents = {start: i for i, (start, _) in enumerate(part.documents)}
        for number, (start, end) in enumerate(part.turns):
            if start in documents:
                i = documents[start]
                console.print(Text(f"── document {i + 1} of {len(part.documents)}{goes_on(part, i)} ──", "bold"))
            if most is not None and start >= most:
                break
            stop = end if most is None else min(end, most)
            trained = sum(kind in ("trained", "stop") for kind in part.kinds[start:end])
            console.print(Text(f"turn {number + 1}: {end - start} tokens, {trained} trained", "dim"))
            text = marked_tokens(part.texts[start:stop], part.kinds[start:stop], colour=colour)
            if text.plain.endswith("\n"):
                text.right_crop()
            console.print(text)
        if most is not None and len(part.ids) > most:
            console.print(f"… and {len(part.ids) - most:,} more tokens: --row {part.row} shows all")


def heading(part: ShownRow) -> str:
    """`row 12 (2nd of its rows): 57 tokens, 12 trained`."""
    which = f" ({part.part + 1}. of its rows)" if part.part else ""
    if not part.ids:
        return f"row {part.row}{which}: " + ("left out" if all(f.asked_for for f in part.faults) else "refused")
    documents = f", {len(part.documents)} documents" if part.documents else ""
    return f"row {part.row}{which}: {len(part.ids):,} tokens, {part.trained:,} trained{documents}"


def goes_on(part: ShownRow, document: int) -> str:
    """What a branch of a tree shares; its first token, which is shown, is the last of it."""
    shared = part.shared(document)
    return "" if shared is None else f", behind the first {shared[1]:,} tokens of document {shared[0] + 1}"


def as_data(part: ShownRow) -> dict[str, Any]:
    """A row for --json."""
    columns = zip(part.ids, part.labels, part.texts, part.kinds, strict=True)
    tokens = [{"id": i, "label": label, "text": text, "kind": kind} for i, label, text, kind in columns]
    return {
        "row": part.row,
        "part": part.part,
        "trained": part.trained,
        "tokens": tokens,
        "turns": part.turns,
        "documents": part.documents,
        "shared": [part.shared(i) for i in range(len(part.documents))],
        "faults": part.faults,
    }


def write_html(path: Path, shown: list[ShownRow], source: Source, model: str) -> None:
    """The page: `inspect.html.j2`."""
    from sft_plugins.cli.ui.pages import render_page, write_page

    rows = list(map(for_page, shown))
    write_page(path, render_page("inspect.html.j2", rows=rows, source=source, model=model, names=NAMES))


def for_page(part: ShownRow) -> dict[str, Any]:
    """A row for the template: documents of turns of tokens; a row that is not packed is one document."""
    name = f"row-{part.row}-{part.part}"
    columns = zip(part.ids, part.labels, part.texts, part.kinds, strict=True)
    tokens = [
        {"id": i, "label": label, "kind": kind, "shown": printable(text).replace("\n", "⏎\n") or "◦"}
        for i, label, text, kind in columns
    ]

    def trained(start: int, end: int) -> int:
        return sum(kind in ("trained", "stop") for kind in part.kinds[start:end])

    def turns(start: int, end: int) -> list[dict[str, Any]]:
        return [
            {"number": i + 1, "trained": trained(a, b), "tokens": tokens[a:b]}
            for i, (a, b) in enumerate(part.turns)
            if start <= a < end
        ]

    documents = [
        {
            "number": i + 1,
            "goes_on": goes_on(part, i),
            "sees": part.sees(i),
            "name": f"{name}-document-{i + 1}",
            "start": start,
            "end": end,
            "trained": trained(start, end),
            "turns": turns(start, end),
        }
        for i, (start, end) in enumerate(part.documents or [(0, len(tokens))])
    ]
    return {
        "name": name,
        "heading": heading(part),
        "faults": part.faults,
        "length": len(tokens),
        "documents": documents if tokens else [],
    }
