"""How a function becomes a command: every command opens, prints and ends alike.

    def audit(out: Output, data: options.DATA, masking: options.Masking) -> int: ...
    add_command(app, audit, epilog="…")      →  sft-plugins audit DATA --train-on … --quiet --json

A parameter whose type is a dataclass becomes the options that are its fields; `out` is made of --quiet and --json. The
function gives the exit code; what it raises is shown by `Output.guard`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Annotated, Any, get_type_hints

import typer

from sft_plugins.cli.ui.output import Output

_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors; the exit code tells.")]
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def add_command(app: typer.Typer, work: Callable[..., int], *, epilog: str) -> None:
    """Make `work` a command of `app`, under its own name and with its docstring as help."""
    hints = get_type_hints(work, include_extras=True)
    groups: dict[str, Any] = {}
    asked: list[Parameter] = []
    for name, parameter in inspect.signature(work).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
            inner = get_type_hints(hints[name], include_extras=True)
            asked += [_option(one.name, inner[one.name], one.default) for one in dataclasses.fields(hints[name])]
        elif name != "out":
            asked.append(_option(name, hints[name], parameter.default))
    asked += [_option("quiet", _QUIET, False), _option("as_json", _JSON, False)]

    @functools.wraps(work)
    def command(*, quiet: bool, as_json: bool, **given: Any) -> None:
        out = Output(quiet=quiet, as_json=as_json)
        with out.guard():
            for name, group in groups.items():
                given[name] = group(**{one.name: given.pop(one.name) for one in dataclasses.fields(group)})
            code = work(out, **given)
        raise typer.Exit(code)

    vars(command).update(__signature__=inspect.Signature(asked), __annotations__={p.name: p.annotation for p in asked})
    app.command(epilog=epilog)(command)


def _option(name: str, kind: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
