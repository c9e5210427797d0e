"""`sft-plugins soften`: gives a collapsed model back as much of its variety as costs no held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from sft_plugins.cli.ui import options
from sft_plugins.cli.ui.command import add_command
from sft_plugins.cli.ui.output import EXIT_FINDINGS, EXIT_NO_VERDICT, EXIT_OK, Output
from sft_plugins.errors import CollapseError

if TYPE_CHECKING:
    from sft_plugins.collapse import Softened

_EPILOG = (
    "Examples: sft-plugins soften runs/a | sft-plugins soften runs/a --at 0.8,0.6 --output runs/milder --html soften.html | "
    "sft-plugins soften runs/full --base ./base. Exit codes: 0 a λ is recommended, or the run is healthy as it is, 1 none is, "
    "2 unusable input, 3 something that a recommendation rests on could not be measured."
)
_STYLES = {"recommended": "bold green", "as_trained": "bold green", "none": "bold yellow", "blind": "bold bright_black"}


def register(app: typer.Typer) -> None:
    add_command(app, soften, epilog=_EPILOG)


def soften(
    out: Output,
    *,
    run: Annotated[
        Path, typer.Argument(help="A watched training's output folder, or one of its checkpoints.", show_default=False)
    ],
    at: Annotated[
        str, typer.Option(help="Shares λ of the training to look at, from 0 to 1; 1 always is.")
    ] = "0.75,0.5,0.25",
    base: Annotated[
        str | None, typer.Option(help="The model training started from, in place of the run's word.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where the softened model goes; an empty folder, or none yet. Default: RUN/softened."),
    ] = None,
    watch: Annotated[
        Path | None, typer.Option(help="The folder of the watch's history. Default: RUN/collapse.")
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(help="A sentence-transformers model, in place of the run's way to tell meanings apart."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the trade-off as one HTML page.")] = None,
    device: options.DEVICE = "auto",
) -> int:
    """Find the share λ of a run's training that keeps its gain and gives variety back, and write that model."""
    shares = _shares(at)
    with out.progress.status("reading the run") as status:
        from sft_plugins.collapse import soften as run_soften
        from sft_plugins.preflight import choose_device

        found = run_soften(
            run, at=shares, base_model=base, output_dir=output, watch=watch, embedder=embedder,
            device=choose_device(device), advance=status.update,
        )  # fmt: skip
    _show(found, out)
    if html is not None:
        from sft_plugins.cli.ui.pages import write_page
        from sft_plugins.collapse import softening_page

        write_page(html, softening_page(found))
        out.console.print(Text(f"page written to {html}"))
    outcome = found.tradeoff.outcome
    out.emit({"command": "soften", "ok": outcome in ("recommended", "as_trained"), **found.to_json()})
    return {"none": EXIT_FINDINGS, "blind": EXIT_NO_VERDICT}.get(outcome, EXIT_OK)


def _shares(at: str) -> list[float]:
    try:
        return [float(part) for part in at.split(",") if part.strip()]
    except ValueError as error:
        raise CollapseError(
            f"--at is {at!r}; expected numbers from 0 to 1 with commas between",
            code="bad_share",
            remedy="write --at 0.75,0.5",
        ) from error


def _show(found: Softened, out: Output) -> None:
    from sft_plugins.collapse import SOFTENING_COLUMNS, softening_headline, softening_rows

    tradeoff = found.tradeoff
    out.console.print(Text(str(found.run), "bold"))
    out.console.print(Text(softening_headline(tradeoff), _STYLES[tradeoff.outcome]))
    out.console.print(Text(f"{tradeoff.reason[:1].upper()}{tradeoff.reason[1:]}."))
    table = Table()
    for title in SOFTENING_COLUMNS:
        table.add_column(title, overflow="fold")
    for place, row in zip(tradeoff.places, softening_rows(tradeoff), strict=True):
        table.add_row(*row, style="bold" if place.share == tradeoff.recommended else "")
    out.console.print(table)
    for note in found.notes:
        out.console.print(Text(f"· {note}", "yellow"))
    if found.output is not None and found.check is not None:
        errors = ", ".join(f"{name.replace('_', ' ')} {error:.1e}" for name, error in found.check.items())
        out.console.print(Text(f"written to {found.output}, loaded again and checked: {errors}"))
