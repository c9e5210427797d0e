"""The pages of measured figures are what the committed results say, and a benchmark that fails takes no result with it.

Runs in both environments: rendering needs jinja2 alone.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
NAMES = sorted(path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py"))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Benchmarks are scripts of one folder that import one another; their plain names are not left behind."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def pages() -> ModuleType:
    import pages

    return pages


# --- the pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["benchmarks.md", "scale.md"])
def test_page_is_what_its_template_makes_of_the_committed_results(pages: ModuleType, name: str) -> None:
    (page,) = (path for path in pages.PAGES if path.name == name)
    assert page.read_text() == pages.render(pages.PAGES[page], pages.all_results()), "make bench ARGS=--render"


@pytest.mark.parametrize(
    ("name", "benchmark", "key"),
    [("benchmarks.md", "collation", "ours_ms"), ("scale.md", "scale", "seconds")],
)
def test_another_figure_makes_another_page(pages: ModuleType, name: str, benchmark: str, key: str) -> None:
    """The guard of the test above: results that are not those of the page are seen."""
    (page,) = (path for path in pages.PAGES if path.name == name)
    results = copy.deepcopy(pages.all_results())
    for found in results:
        for record in found["benchmarks"].get(benchmark, {}).get("records", []):
            if key in record:
                record[key] *= 3
    assert page.read_text() != pages.render(pages.PAGES[page], results)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_is_named_on_the_page(pages: ModuleType, name: str) -> None:
    assert any(f"bench_{name}.py" in page.read_text() for page in pages.PAGES)


def test_the_newest_result_is_shown_and_environments_are_told_apart(pages: ModuleType) -> None:
    def result(date: str, at: str, versions: dict[str, str], x: int) -> dict:
        environment = {"date": date, "machine": {"gpu": None}, "versions": versions}
        return {"file": "", "environment": environment, "benchmarks": {"b": {"at": at, "records": [{"x": x}]}}}

    trl, axolotl = {"trl": "1.16"}, {"trl": "1.9", "axolotl": "0.19"}
    results = [
        result("2026-01-02", "2026-01-02T10:00", trl, 1),
        result("2026-01-02", "2026-01-02T11:00", trl, 2),
        result("2026-01-03", "2026-01-03T09:00", axolotl, 3),
    ]
    found = {
        key: pages.latest(results, "b", **how)["records"][0]["x"]
        for key, how in {"any": {}, "trl": {"lacks": "axolotl"}, "axolotl": {"needs": "axolotl"}}.items()
    }
    assert found == {"any": 3, "trl": 2, "axolotl": 3}
    assert pages.latest(results, "b", gpu=True) is None


# --- the harness ------------------------------------------------------------------------------------------------------

FINDS = 'import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text(\'{{"records": [{{"x": {x}}}], "skipped": {{}}}}\')'


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The harness over a folder of benchmarks of the test's own."""
    import harness

    monkeypatch.setattr(harness, "HERE", tmp_path)
    monkeypatch.setattr(harness, "environment", lambda: {"date": "d", "versions": {}, "machine": {"gpu": None}})
    return harness


def started(harness: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict:
    """What the results hold after `harness.py`; SystemExit as it ends."""
    monkeypatch.setattr(sys, "argv", ["harness.py", *arguments, "--results", str(folder)])
    harness.main()
    return benchmarks(folder)


def benchmarks(folder: Path) -> dict:
    return json.loads((folder / "d-cpu.json").read_text())["benchmarks"]


def test_a_benchmark_that_fails_keeps_what_was_found_and_ends_with_an_error(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results"
    (tmp_path / "bench_a.py").write_text(FINDS.format(x=1))
    (tmp_path / "bench_b.py").write_text(FINDS.format(x=2))
    assert started(harness, monkeypatch, folder)["a"]["records"] == [{"x": 1}]
    (tmp_path / "bench_a.py").write_text("raise SystemExit(3)")
    (tmp_path / "bench_b.py").write_text(FINDS.format(x=4))
    with pytest.raises(SystemExit, match=r"did not finish: a \(ended with 3\)"):
        started(harness, monkeypatch, folder)
    assert benchmarks(folder)["a"]["records"] == [{"x": 1}]
    assert benchmarks(folder)["b"]["records"] == [{"x": 4}]  # those after it still ran


def test_a_benchmark_that_hangs_is_ended_with_what_it_started(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(alive)!r}).write_text('')"
    (tmp_path / "bench_a.py").write_text(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    with pytest.raises(SystemExit, match=r"a \(not done in 1 s\)"):
        started(harness, monkeypatch, tmp_path / "results", "--limit", "1")

    time.sleep(4.5)
    assert not alive.exists()


def test_results_of_another_machine_get_a_file_of_their_own(harness: ModuleType, tmp_path: Path) -> None:
    around = {"date": "d", "versions": {"axolotl": "1"}, "machine": {"gpu": None}}
    (tmp_path / "d-cpu-axolotl.json").write_text(json.dumps({"environment": around}))
    assert harness.file_of(around, tmp_path).name == "d-cpu-axolotl.json"
    assert harness.file_of(around | {"python": "3.12"}, tmp_path).name == "d-cpu-axolotl-2.json"


def test_a_worker_that_dies_is_an_error_not_a_wait_for_ever(harness: ModuleType) -> None:
    from concurrent.futures.process import BrokenProcessPool

    with pytest.raises(BrokenProcessPool):
        harness.alone(os._exit, 9)
