"""`make mutants`: small faults planted one at a time in a copy of the tree, and whether a test notices.

    make mutants                                   goes on where it stopped, up to 300 faults
    make mutants ARGS="--count 40 packing"         … of one package
    make mutants ARGS="--part 1/2"                 every other one; 2/2 beside it, where there are two cores
    make mutants ARGS="--again"                    what survived before, once more (after new tests)
    make mutants ARGS="--list packing/plan"        the faults that would be drawn, without a run
    make mutants ARGS="--page"                     writes docs/testing.md; results of lines that are gone go

Which faults are drawn depends on `--seed` and on the lines alone: a change elsewhere draws no others. Each runs the tests
nearest to it first and stops at the first that fails. A test that does not end is a failure (`time`); tests that are not
through after `--limit` CPU seconds leave a survivor (`cut`). Results are lines of `tests/benchmarks/results/mutants.jsonl`; one
is taken again when its file changes. The tree itself is never touched: a process with the libraries loaded forks for each
fault, and the fork reads a copy.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tests" / "support")]

from declared import equivalent  # noqa: E402
from faults import Fault, faults  # noqa: E402
from forks import Tests, copy_of_the_tree, load_libraries  # noqa: E402

RESULTS = ROOT / "tests" / "benchmarks" / "results" / "mutants.jsonl"
PACKAGES = (
    "sft_plugins/masking",
    "sft_plugins/packing",
    "sft_plugins/collapse",
    "sft_plugins/preflight",
    "integrations",
)
HOSTS = (ROOT / "integrations" / "axolotl", ROOT / "integrations" / "swift")  # whose tests are skipped without them
WORDS = ("wording.py", "pictures.py", "charts.py", "page.py", "summary.py", "words.py")  # sentences and pictures


def drawn(seed: int, wanted: list[str]) -> list[Fault]:
    """Every fault that may be planted, in an order that `seed` decides for each by itself."""
    files = [
        path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name not in WORDS and (wanted or not set(HOSTS) & set(path.parents))
    ]
    names = {path: str(path.relative_to(ROOT)) for path in files}
    found = [
        fault
        for path, name in names.items()
        if not wanted or any(part in name for part in wanted)
        for fault in faults(name, path.read_text(encoding="utf-8"))
        if equivalent(fault.told()) is None
    ]
    return sorted(found, key=lambda fault: hashlib.sha256(f"{seed}|{fault.identity}".encode()).digest())


def spread(order: list[Fault], count: int) -> list[Fault]:
    """The first `count`, each package with its share by the root of its faults, so that small ones are seen too."""
    groups: dict[str, list[Fault]] = {}
    for fault in order:
        package = next(name for name in PACKAGES if fault.path.startswith(name))
        groups.setdefault(package, []).append(fault)
    weights = {name: len(group) ** 0.5 for name, group in groups.items()}
    chosen = {
        fault
        for name, group in groups.items()
        for fault in group[: round(count * weights[name] / sum(weights.values()))]
    }
    return [fault for fault in order if fault in chosen]


def versions() -> dict[str, str]:
    wanted = ("torch", "transformers", "datasets", "trl", "numpy", "pytest")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in wanted}}


def results() -> dict[str, dict[str, Any]]:
    """The last result of each fault."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {record["id"]: record for record in map(json.loads, lines)}


def of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="parts of paths: only faults of these files")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=19)
    parser.add_argument("--limit", type=float, default=600, help="CPU seconds for one fault")
    parser.add_argument("--part", default="1/1", help="2/3: the second of three equal parts, one for each process")
    parser.add_argument("--again", action="store_true", help="what survived, once more")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if options.page:
        from page import write

        still = {fault.identity for fault in drawn(options.seed, list(PACKAGES))}
        kept = [record for identity, record in results().items() if identity in still]
        RESULTS.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8")
        write(ROOT, kept)
        return
    order = spread(drawn(options.seed, options.paths), options.count)
    part, parts = map(int, options.part.split("/"))
    order = order[part - 1 :: parts]
    known = {} if options.list else results()
    waiting = [fault for fault in order if _is_due(known.get(fault.identity), fault.path, again=options.again)]
    print(f"{len(order)} faults drawn, {len(waiting)} to plant", flush=True)
    if options.list:
        for fault in order:
            print(f"{fault.identity} {fault.path}:{fault.line} {fault.was!r} → {fault.text!r}")
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    load_libraries(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; what was found is kept"))  # and the copy is removed
    around = {"date": datetime.date.today().isoformat(), "versions": versions()}
    with copy_of_the_tree(ROOT) as copy:
        tests = Tests(copy, options.limit)
        for number, fault in enumerate(waiting, 1):
            outcome = tests.notice(fault)
            record = {
                "id": fault.identity,
                "line": fault.line,
                **fault.told(),
                **outcome,
                "source": of_file(copy / fault.path),
                **around,
            }
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            place = f"{fault.path}:{fault.line}"
            print(
                f"{number}/{len(waiting)} {outcome['outcome']} {place} {fault.was!r} → {fault.text!r} {outcome.get('by', '')}",
                flush=True,
            )


def _is_due(known: dict[str, Any] | None, path: str, *, again: bool) -> bool:
    if known is None or known["source"] != of_file(ROOT / path):
        return not again
    return again and known["outcome"] not in ("killed", "time")


if __name__ == "__main__":
    main()
