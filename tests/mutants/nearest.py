"""Which tests stand nearest to a fault: the file's namesake, who names its function or imports it, its folder, its package.

sft_plugins/packing/isolation/probe.py  →  tests/packing/isolation/test_probe.py, files that name the function or
                                           import the module, the rest of tests/packing/isolation/ and tests/packing/
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

# What takes minutes, other machines or other environments: distributed processes, GPUs, hosts of another environment.
LEFT_OUT = ("tests/distributed/", "tests/gpu/", "tests/benchmarks/")
ELSEWHERE = {
    "sft_plugins/preflight": ("tests/preflight", "tests/cli/test_doctor.py", "tests/cli/test_preflight.py"),
    "integrations/trl": ("tests/integrations/trl", "tests/preflight"),
    "integrations/axolotl": ("tests/integrations/axolotl", "tests/preflight"),
    "integrations": ("tests/preflight", "tests/integrations"),
}


def nearest(path: str, root: Path, line: int | None = None) -> list[str]:
    """Test files, the likeliest to notice a fault in `path` first; those that name what holds `line` before others."""
    source = Path(path)
    rooms = [_tests_of(folder) for folder in (source.parent, *source.parent.parents) if len(folder.parts) > 1]
    places = [place for folder in (source.parent, *source.parent.parents) for place in ELSEWHERE.get(str(folder), ())]
    every = [str(test.relative_to(root)) for test in sorted((root / "tests").rglob("test_*.py"))]
    every = [test for test in every if not test.startswith(LEFT_OUT)]
    module = ".".join(source.with_suffix("").parts).removesuffix(".__init__")
    module = f"sft_plugins.{module}" if module.startswith("integrations") else module

    named = [test for test in every if _called_after(test, source.stem)]
    importing = [test for test in every if module in imported(root / test)]
    broad = tuple(f"{room}/{name}" for room in rooms for name in ("test_known_failures.py", "known_failures/"))
    near = [test for place in (*rooms, *places) for test in every if test == place or test.startswith(f"{place}/")]
    if not near:  # a module of the root is everybody's
        near = [test for test in every if test.startswith(("tests/masking/", "tests/packing/", "tests/collapse/"))]
    holder, others = _defined(root / path, line)

    def order(test: str) -> tuple[object, ...]:
        said, room = words(root / test), [test.startswith(f"{room}/") for room in rooms]
        return (
            not (test in named and any(room)),
            test not in named,
            holder not in said,
            not (any(room) and _called_after(test, source.parent.name)),  # proof/observe.py: test_proof.py
            test not in importing,
            not test.startswith(broad),  # and soon through
            [not inside for inside in room],
            -len(others & said),
        )

    return sorted(dict.fromkeys([*named, *importing, *near]), key=order)


def _called_after(test: str, name: str) -> bool:
    return Path(test).stem in (f"test_{name.strip('_')}", f"test_{name.strip('_')}s")


def _defined(source: Path, line: int | None) -> tuple[str | None, frozenset[str]]:
    """The function or class of the module that holds `line`, and the names of all."""
    body = ast.parse(source.read_text(encoding="utf-8")).body
    found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    holders = [n.name for n in found if line is not None and n.lineno <= line <= (n.end_lineno or 0)]
    return next(iter(holders), None), frozenset(node.name for node in found)


@functools.cache
def words(test: Path) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", test.read_text(encoding="utf-8")))


def _tests_of(folder: Path) -> str:
    return str(Path("tests", *folder.parts[1:])) if folder.parts[0] == "sft_plugins" else str(Path("tests", folder))


@functools.cache
def imported(test: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(test.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)
