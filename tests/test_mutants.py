"""The driver of `make mutants`: which faults it plants, which tests it runs, and what it takes for noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = ROOT / "tests" / "mutants"
NAMES = ("declared", "faults", "forks", "nearest", "page", "run")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The driver is scripts of one folder that import one another; their plain names are not left behind."""
    monkeypatch.syspath_prepend(MUTANTS)
    yield
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def faults() -> ModuleType:
    import faults

    return faults


def edits(faults: ModuleType, source: str) -> set[tuple[str, str]]:
    return {(fault.was.strip(), fault.text.strip()) for fault in faults.faults("a.py", source)}


# --- which faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "planted"),
    [
        ("x = a < b", {("<", "<="), ("<", ">=")}),
        ("x = a is b in c", {("is", "is not"), ("in", "not in")}),
        ("x = a and b", {("and", "or")}),
        ("x = not a", {("not a", "(a)")}),
        ("if a: b", {("a", "not (a)")}),
        ("n += f", {("n += f", "n = f"), ("n += f", "n -= f")}),
        ("x = a @ b - c * d", {("-", "+"), ("*", "//")}),
        ("x = True, 2, 1e-5", {("True", "False"), ("2", "3"), ("1e-5", "0.01")}),
        ("x = f(a, b=c)", {("b=c", "")}),
        ("x = f(b=c, d=e)", {("b=c,", ""), ("d=e", "")}),
        ("x.y = z", {("x.y = z", "pass")}),
        ("x.restore()", {("x.restore()", "pass")}),
        ("for x in y: continue", {("continue", "break")}),
        ("x = min(a, b)", {("min", "max")}),
        ("x = a.repeat_interleave(b)", {("repeat_interleave", "repeat")}),
        ('if a: raise E("x" + 2, code="y")', {("a", "not (a)"), ('raise E("x" + 2, code="y")', "pass")}),
    ],
)
def test_a_line_has_these_faults(faults: ModuleType, line: str, planted: set[tuple[str, str]]) -> None:
    assert edits(faults, line) == planted


@pytest.mark.parametrize(
    "line",
    [
        '"""Words, and 3 more."""',
        'x = f"{a + 1} of {b}"',
        'x = "a" + b',
        'warnings.warn("3", stacklevel=2)',
        'console.say("x", style=f(1))',
        "x: Literal[1] | None",
        "@decorated(1)\ndef f(): ...",
        "def f(x: int | None = None) -> Literal[1]: ...",
        'def __repr__(self): return "x" * 3',
        "if TYPE_CHECKING:\n    import a",
        '__all__ = ["a"] + b',
        "x = zip(a, b, strict=True)",
    ],
)
def test_wording_and_types_have_none(faults: ModuleType, line: str) -> None:
    assert edits(faults, line) == set()


def test_every_fault_of_the_tree_is_one_edit_and_is_known_by_its_line_alone(faults: ModuleType) -> None:
    """Letters outside ASCII before it count as one; a line put in above moves no fault to another name."""
    source = 'a = "Σ−"  # −\nb = ("ü", c < d)\nb = ("ü", c < d)\n'
    found = faults.faults("a.py", source)
    assert [(fault.line, fault.planted(source).splitlines()[fault.line - 1]) for fault in found] == [
        (2, 'b = ("ü", c <= d)'), (2, 'b = ("ü", c >= d)'), (3, 'b = ("ü", c <= d)'), (3, 'b = ("ü", c >= d)'),
    ]  # fmt: skip
    below = faults.faults("a.py", "import x\n\n" + source)
    assert [fault.identity for fault in below] == [fault.identity for fault in found]
    assert len({fault.identity for fault in found}) == 4


def test_what_is_drawn_is_decided_by_the_seed() -> None:
    import run

    files = ["packing/plan", "collapse/schedule"]
    order = run.drawn(19, files)
    again, other = run.drawn(19, files), run.drawn(20, files)
    assert [fault.identity for fault in run.spread(order, 30)] == [fault.identity for fault in run.spread(again, 30)]
    assert [fault.identity for fault in order] != [fault.identity for fault in other]
    assert {f.path for f in run.spread(order, 30)} == {
        "sft_plugins/packing/plan.py",
        "sft_plugins/collapse/schedule.py",
    }
    assert len({f.identity for f in order}) == len(order)


# --- which tests ------------------------------------------------------------------------------------------------------


def test_tests_that_name_what_holds_the_fault_come_before_others_of_the_folder() -> None:
    """`_buckets` of a file that no test is called after; a file of `proof/` has its folder's."""
    from nearest import nearest

    unpack = "sft_plugins/packing/isolation/backends/unpack.py"
    line = (ROOT / unpack).read_text(encoding="utf-8").partition("def _buckets")[0].count("\n") + 3
    assert nearest(unpack, ROOT, line)[0] == "tests/packing/isolation/unpack/test_way_back.py"
    proof = nearest("sft_plugins/packing/isolation/proof/observe.py", ROOT)
    assert proof[0] == "tests/packing/isolation/test_proof.py"


def test_the_nearest_tests_come_first() -> None:
    from nearest import nearest

    tests = nearest("sft_plugins/packing/isolation/boundaries.py", ROOT)
    assert tests[0] == "tests/packing/isolation/test_boundaries.py"
    room = [place for place, test in enumerate(tests) if test.startswith("tests/packing/isolation/")]
    assert max(room) < tests.index("tests/packing/test_plan.py")
    assert not any(test.startswith(("tests/gpu", "tests/distributed")) for test in tests)
    assert nearest("sft_plugins/_preserve.py", ROOT)[0] == "tests/test_preserve.py"
    assert any(
        test.startswith("tests/integrations/axolotl/") for test in nearest("integrations/axolotl/plugin.py", ROOT)
    )


# --- what is noticed --------------------------------------------------------------------------------------------------

CODE = """import os


def f(n):
    while n > 0:
        n -= 1
    if n == 7:
        os._exit(3)
    return n + 0
"""
TESTS = """from sft_plugins.masking.a import f


def test_unsound():
    assert False


def test_f():
    assert f(3) == 0
"""
TREE = {"sft_plugins/__init__.py": "", "sft_plugins/masking/__init__.py": "", "sft_plugins/masking/a.py": CODE,
        "integrations/__init__.py": "", "tests/masking/test_a.py": TESTS}  # fmt: skip
PLANT = """
import json, sys
from pathlib import Path
from faults import faults
from forks import Tests, copy_of_the_tree
import forks
forks.SECONDS_OF_A_TEST = 6
root = Path(sys.argv[1])
with copy_of_the_tree(root) as copy:
    tests = Tests(copy, limit=300)
    source = (root / "sft_plugins/masking/a.py").read_text()
    told = {}
    for fault in faults("sft_plugins/masking/a.py", source):
        told[f"{fault.was.strip()} to {fault.text.strip()}"] = tests.notice(fault)
    assert (copy / "sft_plugins/masking/a.py").read_text() == source
print(json.dumps(told))
"""


def test_faults_are_planted_in_a_copy_and_a_test_that_fails_anyway_notices_none(tmp_path: Path) -> None:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    paths = os.pathsep.join(map(str, (MUTANTS, ROOT / "tests" / "support")))
    around = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", PLANT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=around, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, dict[str, Any]] = json.loads(done.stdout)
    outcomes = {name: (found["outcome"], found["by"].rpartition("::")[2]) for name, found in told.items()}
    assert outcomes["> to >="] == ("killed", "test_f")  # −1
    assert outcomes["n -= 1 to n += 1"] == ("time", "test_f")
    assert outcomes["== to !="] == ("killed", "the process ended")
    assert outcomes["7 to 8"] == ("survived", "")
    assert {name: (tmp_path / name).read_text() for name in TREE} == TREE


# --- what is declared and written -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "key"), [("equivalents.yaml", "why"), ("survivors.yaml", "changes")])
def test_what_is_declared_of_a_fault_is_of_one_that_is_there(faults: ModuleType, name: str, key: str) -> None:
    from declared import entries

    for entry in entries(name):
        assert len(entry[key].split()) >= 4, entry
        source = (ROOT / entry["file"]).read_text(encoding="utf-8")
        there = [(fault.statement, fault.was, fault.text) for fault in faults.faults(entry["file"], source)]
        assert (entry["statement"], entry["was"], entry["is"]) in there, entry


def test_the_page_is_what_the_results_make_of_it() -> None:
    import page
    import run

    text = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    results = list(run.results().values())
    assert page.rendered(text, results) == text, "make mutants ARGS=--page"
    assert page.rendered(text, [{**result, "outcome": "survived"} for result in results]) != text
