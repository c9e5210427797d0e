"""Command line of sft-plugins. Heavy imports wait until a command runs, so that `--help` is quick."""

from __future__ import annotations

import importlib

import typer

from sft_plugins import __version__
from sft_plugins.cli.ui.output import Commands

__all__ = ["app"]

# Each names a module here with a function `register(app)`; in the order of `--help`.
_COMMANDS = (
    "inspect",
    "audit",
    "pack",
    "mask",
    "doctor",
    "report",
    "soften",
    "preflight",
    "demo",
)

app = typer.Typer(
    cls=Commands,
    help="Exact masking, contamination-free packing and a mode-collapse alarm for TRL and Axolotl.\n\n"
    "Exit codes: 0 nothing found, 1 faults found, 2 the input cannot be used, 130 stopped by ^C.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sft-plugins {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
    ),
) -> None:
    """Makes every command a sub-command, even one that is alone."""


for _name in _COMMANDS:
    importlib.import_module(f"sft_plugins.cli.{_name}").register(app)
