"""Command line of sft-plugins. Heavy imports wait until a command runs, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from sft_plugins.errors import SFTPluginsError

__all__ = ["app"]

app = typer.Typer(
    help="Exact masking, contamination-free packing and a mode-collapse alarm for TRL and Axolotl.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Makes `demo` a sub-command even while it is the only one."""


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="A folder or a hub id; by default SmolLM2-135M-Instruct out of a package.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A JSON Lines file of rows to train on; by default real conversations.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 24,
    output: Annotated[Path, typer.Option(help="Where the adapter is written.")] = Path("runs/demo"),
    max_length: Annotated[int, typer.Option(min=16, help="Most tokens of a row; later turns are left off.")] = 256,
    device: Annotated[
        str, typer.Option(help='"auto" takes a GPU if there is one; else "cpu", "cuda", "cuda:1".')
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the split, the order and the adapter's first weights.")] = 0,
    collapse: Annotated[
        bool, typer.Option("--collapse", help="Train on one safe sentence as every answer, to see the alarm fire.")
    ] = False,
) -> None:
    """Fine-tune a real model on real conversations with LoRA, and show what was trained and what it changed."""
    with _errors_as_messages():
        from sft_plugins.cli.demo import Settings, run_demo

        settings = Settings(
            model=model, data=data, steps=steps, output=output, max_length=max_length, device=device, seed=seed,
            collapse=collapse,
        )  # fmt: skip
        run_demo(settings, console=Console())


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """What this library raises on purpose is written for people: print it, without the stack below it."""
    try:
        yield
    except SFTPluginsError as error:
        where = "" if error.row is None else f" (row {error.row})"
        stderr = Console(stderr=True)
        stderr.print(Text.assemble((f"error [{error.code}]{where}: ", "bold red"), error.message))
        if error.remedy:
            stderr.print(Text.assemble(("what to do: ", "bold"), error.remedy))
        raise typer.Exit(1) from error
