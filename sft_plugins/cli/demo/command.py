"""`sft-plugins demo` on the command line; what it does is in `demo.py`, loaded when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sft_plugins.cli.ui import options
from sft_plugins.cli.ui.output import Output


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sft-plugins demo --steps 12 --data my_rows.jsonl")(demo)


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
    device: options.DEVICE = "auto",
    seed: Annotated[int, typer.Option(help="Of the split, the order and the adapter's first weights.")] = 0,
    collapse: Annotated[
        bool, typer.Option("--collapse", help="Train on one safe sentence as every answer, to see the alarm fire.")
    ] = False,
) -> None:
    """Fine-tune a real model on real conversations with LoRA, and show what was trained and what it changed."""
    with Output(quiet=False, as_json=False).guard():
        from sft_plugins.cli.demo.demo import Settings, run_demo

        settings = Settings(
            model=model, data=data, steps=steps, output=output, max_length=max_length, device=device, seed=seed,
            collapse=collapse,
        )  # fmt: skip
        run_demo(settings, console=Console(markup=False, emoji=False))
