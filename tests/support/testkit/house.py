"""A tree of packages read as it stands, without importing it: who imports whom, and what a folder holds.

A tree is a folder with `sft_plugins/` and, beside it, `integrations/`, which is installed as `sft_plugins.integrations`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOTS = ("sft_plugins", "integrations")


def sources(root: Path) -> list[Path]:
    return [path for name in ROOTS for path in sorted((root / name).rglob("*.py"))]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    parts = ("sft_plugins", *parts) if parts[0] == "integrations" else parts
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path, root: Path) -> Iterator[tuple[str, str]]:
    """`(module, name)` of every import at the top of `path` or inside a function; `import a.b` is `("a.b", "")`."""
    module = module_name(path, root)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            yield from ((".".join(part for part in (base, node.module) if part), alias.name) for alias in node.names)


def import_graph(root: Path) -> dict[str, set[str]]:
    """Each module → the modules of the tree that it imports; `from a import b` is `a.b` where that is a module."""
    modules = {module_name(path, root): path for path in sources(root)}
    return {
        module: {
            target
            for package, name in imports(path, root)
            if (target := f"{package}.{name}" if f"{package}.{name}" in modules else package) in modules
        }
        for module, path in modules.items()
    }


def crowded_folders(root: Path, most: int = 9) -> dict[str, int]:
    """Folders that list more than `most` modules, `__init__` aside."""
    counts: dict[str, int] = {}
    for path in sources(root):
        if path.name != "__init__.py":
            folder = str(path.parent.relative_to(root))
            counts[folder] = counts.get(folder, 0) + 1
    return {folder: count for folder, count in counts.items() if count > most}


def inner_imports(root: Path) -> set[tuple[str, str]]:
    """`(package, inner module of another package)`: what one top package takes from behind another's face.

    A face is what `sft_plugins/NAME/__init__.py` gives; modules of the root, `errors` and the private ones, are common.
    """
    return {
        (_top(module), target)
        for module, targets in import_graph(root).items()
        for target in targets
        if target.count(".") > 1 and _top(target) != _top(module)
    }


def _top(module: str) -> str:
    return f"{module}.".split(".")[1]


def import_circles(root: Path) -> list[list[str]]:
    """Groups of modules that import one another, at the top, inside a function or for their types.

    The root's own face is no link of a circle: it names every public name and loads none until it is asked for.
    """
    graph = {module: targets for module, targets in import_graph(root).items() if module != "sft_plugins"}
    reach = {module: _reached(module, graph) for module in graph}
    groups = {tuple(sorted(one for one in reach[module] if module in reach[one])) for module in graph}
    return sorted(list(group) for group in groups if group)


def _reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        module = waiting.pop()
        if module in graph and module not in seen:
            seen.add(module)
            waiting.extend(graph[module])
    return seen
