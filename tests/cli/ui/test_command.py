"""A function becomes a command: its groups are options, its number the exit code, its errors are shown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner, Result

from sft_plugins.cli.ui.command import add_command
from sft_plugins.cli.ui.output import Output
from sft_plugins.errors import AssetError


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A group of options."""

    width: Annotated[int, typer.Option(min=1, help="How wide.")] = 3
    names: Annotated[list[str] | None, typer.Option("--name", help="Names.")] = None


def draw(
    out: Output,
    *,
    shape: Annotated[str, typer.Argument(help="What.")],
    code: Annotated[int, typer.Option(help="Needed.")],
    sizes: Sizes,
    fails: Annotated[bool, typer.Option("--fails", help="Raise.")] = False,
) -> int:
    """Draw a shape."""
    if fails:
        raise AssetError("no paper", code="missing_file", remedy="buy some")
    out.console.print(f"{shape} {sizes.width} {sizes.names or []}")
    out.emit({"shape": shape, "width": sizes.width})
    return code


def call(*arguments: str) -> Result:
    app = typer.Typer()
    add_command(app, draw, epilog="Example: draw circle.")
    app.callback()(lambda: None)  # so that it is a sub-command, though alone
    return CliRunner().invoke(app, ["draw", *arguments], env={"COLUMNS": "100"})


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("circle", "--code", "0"), "circle 3 []", 0),
        (("circle", "--code", "3", "--width", "5", "--name", "a", "--name", "b"), "circle 5 ['a', 'b']", 3),
        (("circle", "--code", "1", "--quiet"), "", 1),
    ],
)
def test_options_of_a_group_reach_it_and_the_number_is_the_exit_code(
    arguments: tuple[str, ...], said: str, code: int
) -> None:
    done = call(*arguments)
    assert (done.stdout.strip(), done.exit_code) == (said, code)


def test_json_is_one_document_of_results_or_of_the_error() -> None:
    assert json.loads(call("circle", "--code", "0", "--json").stdout) == {"shape": "circle", "width": 3}
    done = call("circle", "--code", "0", "--fails", "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"] == {
        "code": "missing_file", "message": "no paper", "row": None, "remedy": "buy some",
    }  # fmt: skip


@pytest.mark.parametrize("arguments", [(), ("circle",), ("circle", "--code", "0", "--width", "0")])
def test_what_is_missing_or_out_of_range_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == 2


def test_help_names_every_option_in_the_order_of_the_function() -> None:
    said = call("--help").stdout
    words = [
        "Draw a shape.",
        "--code",
        "--width",
        "--name",
        "--fails",
        "--quiet",
        "--json",
        "Example: draw circle.",
    ]
    places = [said.index(word) for word in words]
    assert places == sorted(places)
