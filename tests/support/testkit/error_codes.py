"""The codes that a tree of packages can raise or report, read from its syntax trees.

A code is written as a constant in one of four places:

    raise MaskingError(…, code="overflow")                 an argument named `code`, or the default of one
    finding("error", "overflow", …)                        an argument of a function whose parameter is named `code`
    Finding("warn", "narrowing", …)                        a field of a class that is named `code`
    REMEDIES = {"overflow": …}                             a key of the tables that speak of codes

Everything else that stands where a code belongs hands on a code made elsewhere: `error.code`, `code`, `record["code"]`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from testkit.house import imports, module_name, sources

TABLES = {"FAILURES", "REMEDIES"}
NUMBERS = "collapse/metrics/homogeneity.py"  # there a `code` is the number of a group
_CODE = re.compile(r"[a-z]+(_[a-z]+)*")


def codes(root: Path) -> dict[str, set[str]]:
    """Each code → the files that name it."""
    found: dict[str, set[str]] = {}
    for path, place in _places(root):
        for code in _constants(place):
            found.setdefault(code, set()).add(str(path.relative_to(root)))
    return found


def unreadable(root: Path) -> list[str]:
    """Places of a code that hold neither a constant nor a code handed on: what this reading would overlook."""
    return sorted(
        f"{path.relative_to(root)}:{place.lineno}: {ast.unparse(place)}"
        for path, place in _places(root)
        if not _constants(place) and not _handed_on(place)
    )


def _places(root: Path) -> Iterator[tuple[Path, ast.expr]]:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources(root)}
    takers = {module_name(path, root): dict(_takers(tree)) for path, tree in trees.items()}
    methods = {name: place for of_module in takers.values() for name, place in of_module.items()}
    for path, tree in trees.items():
        if path.as_posix().endswith(NUMBERS):
            continue
        given = {name: takers[module][name] for module, name in imports(path, root) if name in takers.get(module, {})}
        known = given | takers[module_name(path, root)]
        for node in ast.walk(tree):
            yield from ((path, place) for place in _of(node, known, methods))


def _takers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Functions and classes that take a code by position, and at which."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            names = names[1:] if names[:1] in (["self"], ["cls"]) else names
        elif isinstance(node, ast.ClassDef):
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            names = [item.target.id for item in fields if isinstance(item.target, ast.Name)]
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and "code" in names:
            yield node.name, names.index("code")


def _of(node: ast.AST, known: dict[str, int], methods: dict[str, int]) -> Iterator[ast.expr]:
    if isinstance(node, ast.Call):
        yield from (keyword.value for keyword in node.keywords if keyword.arg == "code")
        if isinstance(node.func, ast.Attribute):  # of an object whose class is not looked for
            at = known.get(node.func.attr, methods.get(node.func.attr))
        else:
            at = known.get(getattr(node.func, "id", ""))
        yield from node.args[at : at + 1] if at is not None else []
    elif isinstance(node, ast.arguments):
        defaults = zip(node.kwonlyargs, node.kw_defaults, strict=True)
        yield from (default for argument, default in defaults if argument.arg == "code" and default)
    elif isinstance(node, ast.Assign) and {getattr(target, "id", "") for target in node.targets} & TABLES:
        yield from (key for key in getattr(node.value, "keys", []) if key is not None)


def _constants(place: ast.expr) -> set[str]:
    if isinstance(place, ast.IfExp):
        return _constants(place.body) | _constants(place.orelse)
    if isinstance(place, ast.Constant) and isinstance(place.value, str) and _CODE.fullmatch(place.value):
        return {place.value}
    return set()


def _handed_on(place: ast.expr) -> bool:
    match place:
        case ast.Name(id="code") | ast.Attribute(attr="code") | ast.Constant(value=None):
            return True
        case ast.Subscript(slice=ast.Constant(value="code")):
            return True
    return False
