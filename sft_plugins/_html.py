"""One way to write an HTML page, for the library and the command line: Jinja2 templates of this package over one shell.

Invariant: text from data, models and configs is escaped, and a name that a template misspells is an error, never a blank.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


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
