"""`docs/known-failures.md` and the numbers that code, tests and pages cite.

    python tests/support/testkit/known_failures.py --write

writes the page's last column anew: the tests whose docstrings cite a number (`M7`, `C2–C4` for three of them), and preflight's
table of planted faults, `Fault(failure="M7", …)`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = "docs/known-failures.md"
CITING = ("sft_plugins/**/*.py", "integrations/**/*.py", "tests/**/*.py", "docs/*.md", "*.md", "configs/*")
NUMBER = re.compile(r"(?<![\w.#/-])([MPC])([1-9]\d?)(?:[–-]\1?([1-9]\d?))?(?![\w%/-]|\.\d|–\d)")
_ROW = re.compile(r"^\| ([MPC]\d+) \|.*\| (.*)\|$", flags=re.M)


def numbers(text: str) -> Iterator[str]:
    """Every number that `text` cites; a range is each of its numbers."""
    for letter, first, last in NUMBER.findall(text):
        yield from (f"{letter}{number}" for number in range(int(first), int(last or first) + 1))


def rows(page: str) -> dict[str, str]:
    """Each number of the page → the cell of its tests."""
    return {number: cell.strip() for number, cell in _ROW.findall(page)}


def cited(root: Path) -> dict[str, set[str]]:
    """Each number → the files of the tree that name it."""
    found: dict[str, set[str]] = {}
    for path in (path for pattern in CITING for path in root.glob(pattern) if path.is_file()):
        name = str(path.relative_to(root))
        if name != PAGE and "benchmarks/results" not in name:
            for number in numbers(path.read_text(encoding="utf-8")):
                found.setdefault(number, set()).add(name)
    return found


def held(root: Path) -> dict[str, dict[str, list[str]]]:
    """Each number → files of tests → the tests there that cite it."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        name = str(path.relative_to(root))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in dict.fromkeys(numbers(ast.get_docstring(node) or "")):
                    found.setdefault(number, {}).setdefault(name, []).append(node.name)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Fault":
                for keyword in node.keywords:
                    if keyword.arg == "failure" and isinstance(keyword.value, ast.Constant):
                        found.setdefault(keyword.value.value, {}).setdefault(name, [])
    return found


def written(page: str, tests: dict[str, dict[str, list[str]]]) -> str:
    """The page with the cells of its tests as they should be."""

    def cell(match: re.Match[str]) -> str:
        files = sorted(tests.get(match[1], {}).items())
        links = [" ".join([f"[{_short(file)}](../{file})", *(f"`{name}`" for name in names)]) for file, names in files]
        line = match[0][: match.start(2) - match.start()]
        return f"{line}{'<br>'.join(links)} |" if links else f"{line}|"

    return _ROW.sub(cell, page)


def _short(file: str) -> str:
    return file.removeprefix("tests/").removesuffix(".py")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    tree = Path(__file__).resolve().parents[3]
    target = tree / PAGE
    target.write_text(written(target.read_text(encoding="utf-8"), held(tree)), encoding="utf-8")
