"""The small faults that can be planted in a source file, read from its syntax tree: one `Fault` each, as an edit of text.

    n < limit            →  n <= limit · n >= limit          what bounds
    a and b, not a       →  a or b, a                        what decides
    if a:                →  if not (a):
    total += n           →  total = n · total -= n           what counts
    2 * size + 3         →  2 // size + 3 · 2 * size - 3 · 3 * size + 3 …
    1e-5                 →  1e-2                             a thousand times looser
    call(x, start=s)     →  call(x)                          what is handed on
    thing.restore()      →  pass                             what restores
    continue, raise X    →  break, pass

Wording is left out: strings, the arguments of what is raised or said, docstrings, annotations, names exported.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

COMPARED = {
    ast.Lt: ("<=", ">="), ast.LtE: ("<", ">"), ast.Gt: (">=", "<="), ast.GtE: (">", "<"), ast.Eq: ("!=",),
    ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",), ast.In: ("not in",), ast.NotIn: ("in",),
}  # fmt: skip
REDUCED = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "//",
    ast.FloorDiv: "*",
    ast.Div: "*",
    ast.Mod: "//",
    ast.BitOr: "&",
    ast.BitAnd: "|",
}
SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any", "argmin": "argmax", "argmax": "argmin",
           "amax": "amin", "minimum": "maximum", "maximum": "minimum", "repeat_interleave": "repeat",
           "floor": "ceil", "ceil": "floor", "cumsum": "cumprod"}  # fmt: skip
SAYING = {"warn", "warning", "debug", "info", "say", "say_once", "print", "echo", "add_row", "assemble", "Text"}
UNSEEN = {"copy", "strict", "stacklevel"}  # what costs only, what asserts an invariant of our own, what points
SILENT = {"__repr__", "__str__", "__rich__", "__rich_console__", "__dir__"}


@dataclass(frozen=True)
class Fault:
    """An edit: `source[start:end]` becomes `text`, in the file at `path`."""

    path: str
    kind: str
    start: int
    end: int
    text: str
    line: int
    statement: str
    """The line it stands in, and which of its like in the file: what a fault is known by when lines move."""
    column: int
    was: str

    @property
    def identity(self) -> str:
        told = f"{self.path}|{self.kind}|{self.statement}|{self.column}|{self.was}|{self.text}"
        return hashlib.blake2b(told.encode(), digest_size=6).hexdigest()

    def told(self) -> dict[str, str]:
        return {"file": self.path, "kind": self.kind, "statement": self.statement, "was": self.was, "is": self.text}

    def planted(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]


def faults(path: str, source: str) -> list[Fault]:
    """Every fault of a file, each an edit after which it is still Python."""
    found, seen = [], set()
    reader, lines = _Reader(source), source.splitlines()
    for kind, start, end, text in reader.edits(ast.parse(source)):
        line = source.count("\n", 0, start) + 1
        edit = (start, end, text)
        if edit in seen or source[start:end] == text:
            continue
        seen.add(edit)
        own = lines[line - 1]
        column = start - reader.lines[line - 1] - (len(own) - len(own.lstrip()))
        number = [each.strip() for each in lines[: line - 1]].count(own.strip())
        statement = f"{own.strip()} #{number + 1}" if number else own.strip()
        fault = Fault(path, kind, start, end, text, line, statement, column, source[start:end])
        try:
            ast.parse(fault.planted(source))
        except SyntaxError:
            continue
        found.append(fault)
    return found


Edit = tuple[str, int, int, str]


class _Reader:
    def __init__(self, source: str) -> None:
        self.source = source
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def at(self, line: int, byte: int) -> int:
        """The character that syntax trees know by its line and byte."""
        start = self.lines[line - 1]
        return start + len(self.source[start : self.lines[line]].encode()[:byte].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end]

    def edits(self, node: ast.AST) -> Iterator[Edit]:
        """Of a node and all below it, wording left out."""
        if (
            getattr(node, "name", "") in SILENT
            or getattr(node, "arg", "") in UNSEEN
            or _is_typing(node)
            or _is_saying(node)
        ):
            return
        if isinstance(node, ast.Raise):
            yield ("raise", *self.span(node), "pass")
            return
        if isinstance(node, ast.stmt):
            yield from self.of_statement(node)
        if isinstance(node, ast.expr):
            yield from self.of_expression(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params") or isinstance(node, ast.JoinedStr):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.edits(child)

    def of_statement(self, node: ast.stmt) -> Iterator[Edit]:
        span = self.span(node)
        match node:
            case ast.Continue():
                yield "loop", *span, "break"
            case ast.Break():
                yield "loop", *span, "continue"
            case ast.Expr(value=ast.Call()) | ast.Delete():
                yield "statement", *span, "pass"
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield "statement", *span, "pass"
            case ast.AugAssign():
                target, value = self.text(node.target), self.text(node.value)
                yield "count", *span, f"{target} = {value}"
                if (other := REDUCED.get(type(node.op))) is not None:
                    yield "count", *span, f"{target} {other}= {value}"
            case ast.If():
                yield from self.negated(node.test)

    def of_expression(self, node: ast.expr) -> Iterator[Edit]:
        span = self.span(node)
        match node:
            case ast.Compare():
                left = node.left
                for op, right in zip(node.ops, node.comparators, strict=True):
                    between = (self.span(left)[1], self.span(right)[0])
                    old = self.source[between[0] : between[1]]
                    for other in COMPARED[type(op)]:
                        yield "compare", *between, old.replace(old.strip("() \n"), other)
                    left = right
            case ast.BoolOp():
                word, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                for a, b in zip(node.values, node.values[1:], strict=False):
                    between = (self.span(a)[1], self.span(b)[0])
                    yield "logic", *between, self.source[slice(*between)].replace(word, other)
            case ast.UnaryOp(op=ast.Not()):
                yield "logic", *span, f"({self.text(node.operand)})"
            case ast.IfExp():
                yield from self.negated(node.test)
            case ast.BinOp() if type(node.op) in REDUCED and not _is_text(node):
                between = (self.span(node.left)[1], self.span(node.right)[0])
                old = self.source[slice(*between)]
                yield "arithmetic", *between, old.replace(old.strip("() \n"), REDUCED[type(node.op)])
            case ast.Constant(value=bool()):
                yield "constant", *span, str(not node.value)
            case ast.Constant(value=int()):
                yield "constant", *span, str(node.value + 1)
            case ast.Constant(value=float()):
                yield "constant", *span, repr(node.value * 1000)
            case ast.Call():
                yield from self.of_call(node)

    def of_call(self, node: ast.Call) -> Iterator[Edit]:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in SWAPPED:
            end = self.span(node.func)[1]
            yield "swap", end - len(name), end, SWAPPED[name]
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in UNSEEN:
                start, end = self.span(keyword)
                rest = self.source[end:]
                comma = len(rest) - len(rest.lstrip()) + 1 if rest.lstrip().startswith(",") else 0
                yield "argument", start, end + comma, ""

    def negated(self, test: ast.expr) -> Iterator[Edit]:
        if not isinstance(test, ast.Compare) and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
            yield "logic", *self.span(test), f"not ({self.text(test)})"


def _is_typing(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets)


def _is_saying(node: ast.AST) -> bool:
    """A docstring, or a call that only tells people something."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    call = node.value if isinstance(node, ast.Expr) else node
    if not isinstance(call, ast.Call):
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in SAYING or name.endswith(("Error", "_error"))


def _is_text(node: ast.BinOp) -> bool:
    return any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in ast.walk(node)
    )
