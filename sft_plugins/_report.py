"""How what was found is said: as plain data for JSON, as lines of text, as an HTML page.

Invariant: text from data, models and configs is escaped in a page, and a name that a template misspells is an error, never a
blank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from rich.console import RenderableType


def plain(value: Any) -> Any:
    """`value` as JSON has it: dataclasses become objects, paths text, arrays lists, NumPy's numbers numbers, NaN and ∞ null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and torch
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_text(shown: RenderableType, *, width: int) -> str:
    """What `shown` looks like on a console of this width without colour."""
    from rich.console import Console

    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(shown)
    return capture.get().rstrip()


def render_page(template: str, **context: Any) -> str:
    """The HTML of `template` with the names in `context`.

    Args:
        template: its path inside the package, `"collapse/report/report.html.j2"`; a bare name lies in `cli/ui/`. Pages
            begin with `{% extends "base.html.j2" %}` and fill its blocks `title`, `style`, `body` and `script`.

    Raises:
        jinja2.UndefinedError: for a name that is not in `context`.
    """
    return _environment().get_template(template).render(**context)


@cache
def _environment() -> Environment:
    import jinja2

    def source(name: str) -> str | None:
        path = resources.files("sft_plugins").joinpath(name if "/" in name else f"cli/ui/{name}")
        return path.read_text(encoding="utf-8") if path.is_file() else None

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
