"""Which tests stand nearest to a source file: its namesake, who imports it, known failures, its folder, its package.

sft_plugins/packing/isolation/probe.py  →  tests/packing/isolation/test_probe.py, files that import it,
                                           tests/packing/isolation/, tests/packing/
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

# What takes minutes, other machines or other environments: distributed processes, GPUs, hosts of another environment.
LEFT_OUT = ("tests/distributed/", "tests/gpu/", "tests/benchmarks/")
ELSEWHERE = {
    "sft_plugins/preflight": ("tests/preflight", "tests/cli/test_doctor.py", "tests/cli/test_preflight.py"),
    "integrations/trl": ("tests/integrations/trl", "tests/preflight"),
    "integrations/axolotl": ("tests/integrations/axolotl", "tests/preflight"),
    "integrations": ("tests/preflight", "tests/integrations"),
}


def nearest(path: str, root: Path) -> list[str]:
    """Test files, the likeliest to notice a fault in `path` first."""
    source = Path(path)
    rooms = [_tests_of(folder) for folder in (source.parent, *source.parent.parents) if len(folder.parts) > 1]
    places = [place for folder in (source.parent, *source.parent.parents) for place in ELSEWHERE.get(str(folder), ())]
    every = [str(test.relative_to(root)) for test in sorted((root / "tests").rglob("test_*.py"))]
    every = [test for test in every if not test.startswith(LEFT_OUT)]
    module = ".".join(source.with_suffix("").parts).removesuffix(".__init__")
    module = f"sft_plugins.{module}" if module.startswith("integrations") else module
    stem = source.stem.strip("_")

    named = [test for test in every if Path(test).stem in (f"test_{stem}", f"test_{stem}s")]
    named.sort(key=lambda test: not any(test.startswith(f"{room}/") for room in rooms))
    importing = [test for test in every if module in imported(root / test)]
    broad = tuple(f"{room}/{name}" for room in rooms for name in ("test_known_failures.py", "known_failures/"))
    known = [test for test in every if test.startswith(broad)]  # and soon through
    near = [test for place in (*rooms, *places) for test in every if test == place or test.startswith(f"{place}/")]
    if not near:  # a module of the root is everybody's
        near = [test for test in every if test.startswith(("tests/masking/", "tests/packing/", "tests/collapse/"))]
    return list(dict.fromkeys([*named, *importing, *known, *near]))


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
