"""The pages of measured figures are what the committed results say, and a benchmark that fails takes no result with it.

Runs in both environments; in Axolotl's the benchmarks that `make bench` runs there.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from testkit.patience import HANGS

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


def test_parts_of_a_benchmark_are_added_up(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run split by `--rows`, as on a device lent for minutes: what is measured again is replaced, the rest stays."""
    found = """
import json, pathlib, sys
rows = [int(x) for x in sys.argv[2:-3]]  # --rows 2 8 1.0 --json file
records = [{"method": m, "rows": n, "seconds": float(sys.argv[-3])} for n in rows for m in ("a", "b")]
pathlib.Path(sys.argv[-1]).write_text(json.dumps({"arguments": {"rows": rows}, "records": records, "skipped": {}}))
"""
    (tmp_path / "bench_x.py").write_text(found)

    def seconds(*arguments: str) -> list[tuple[str, int, float]]:
        kept = started(harness, monkeypatch, tmp_path / "results", "x", "--rows", *arguments)["x"]["records"]
        return [(record["method"], record["rows"], record["seconds"]) for record in kept]

    seconds("2", "8", "1.0")
    one, two = [("a", 2, 1.0), ("b", 2, 1.0)], [("a", 8, 2.0), ("b", 8, 2.0)]
    assert seconds("8", "2.0", "--add") == one + two
    assert seconds("8", "2.0") == two


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


# --- the benchmarks ---------------------------------------------------------------------------------------------------

SMALL = {
    "attention": ["--tokens", "128", "256", "--mean", "32", "--repeats", "1"],
    "balance": ["--ranks", "8", "512", "--capacity", "4096", "--documents", "20000"],
    "callback": ["--device", "cpu", "--layers", "1", "--steps", "2"],
    "collation": ["--documents", "4", "--epoch", "20", "--epochs", "1"],
    "detector_power": ["--runs", "5"],
    "folding": ["--n", "2000", "--repeats", "1"],
    "forward_inputs": ["--examples", "20"],
    "interval_coverage": ["--runs", "2"],
    "kernels": ["--device", "cpu", "--rows", "256", "--repeats", "1"],
    "masking": ["--rows", "12", "--rounds", "1", "--no-memory"],
    "packing": ["--n", "200", "--repeats", "1"],
    "planning": ["--n", "2000", "--repeats", "1"],
    "preparation": ["--rows", "12", "--rounds", "1"],
    "scale": [
        "--plan",
        "1000",
        "--deal",
        "1000",
        "--stream",
        "300",
        "--pack",
        "1000",
        "--sample",
        "1000",
        "--read",
        "300",
    ],
    "step": [
        *("--device", "cpu", "--models", "SmolLM2-135M", "--layers", "1", "--rows", "256", "--tokens", "512"),
        *("--passes", "1", "--vocabulary", "512"),
    ],
    "trees": [
        *("--device", "cpu", "--templates", "qwen3", "--messages", "8", "--conversations", "4", "--timed", "2"),
        *("--layers", "1", "--rows", "1024", "--vocabulary", "512"),
    ],
    "unpack": ["--architectures", "llama"],
}


BESIDE_AXOLOTL = ["masking", "planning", "collation"]


def test_every_benchmark_has_a_small_run() -> None:
    assert sorted(SMALL) == NAMES
    makefile = (BENCHMARKS.parents[1] / "Makefile").read_text()
    assert f"AXOLOTL_BENCH := {' '.join(BESIDE_AXOLOTL)}\n" in makefile


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_benchmark_runs_and_finds_something(name: str, found: dict[str, dict]) -> None:
    pytest.importorskip("trl", reason="TRL is what most benchmarks compare with")
    pytest.importorskip("chitchat_dataset", reason="the conversations")
    beside_axolotl = importlib.util.find_spec("axolotl") is not None
    if beside_axolotl and name not in BESIDE_AXOLOTL:
        pytest.skip("runs in the newest environment")
    import harness

    found[name] = harness.run(name, SMALL[name], limit=HANGS)
    assert found[name]["records"]
    assert found[name]["busy_elsewhere"] >= 0
    if name == "step":
        assert len({record["supervised"] for record in found[name]["records"]}) == 1
        assert {record["method"] for record in found[name]["records"]} >= {"padded", "TRL bfd", "dense", "ours"}
    if name == "masking":
        rows = [record for record in found[name]["records"] if record["what"] == "preparation"]
        assert [record["differ_trl"] for record in rows] == [0, 0]
    if beside_axolotl:
        assert any(key.startswith("axolotl") for record in found[name]["records"] for key in record) or (
            "Axolotl multipack" in [record.get("planner") for record in found[name]["records"]]
        )


@pytest.mark.slow
def test_the_page_can_be_made_of_new_results(pages: ModuleType, found: dict[str, dict]) -> None:
    """The committed results may be of an earlier form: the template must do with what the benchmarks write now."""
    if set(found) != set(NAMES):
        pytest.skip("needs the results of the tests above")
    import harness

    around = harness.environment()
    (template,) = (template for page, template in pages.PAGES.items() if page.name == "benchmarks.md")
    page = pages.render(template, [{"file": "new.json", "environment": around, "benchmarks": found}])
    assert "of them busy with other work" in page
    assert "| SmolLM2-135M | 2,048 | not measured |" in page  # no figure for what was not run
