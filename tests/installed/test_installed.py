"""What users install: the wheel without extras, in an environment that holds nothing else (`make test-install` builds both)."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Collection
from email.parser import Parser
from pathlib import Path

import pytest

import sft_plugins
from testkit.tokenizers import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("inspect", "audit", "pack", "mask", "doctor", "report", "soften", "preflight", "demo")


def tree() -> dict[str, Path]:
    """Every file of the packages in the repository, by the name under which it is installed."""
    folders = {"sft_plugins": ROOT / "sft_plugins", "sft_plugins/integrations": ROOT / "integrations"}
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def modules() -> list[str]:
    names = [name.removesuffix(".py").replace("/", ".") for name in tree() if name.endswith(".py")]
    return sorted(name.removesuffix(".__init__") for name in names if not name.endswith("__main__"))


@pytest.fixture(scope="session")
def environment() -> Path:
    named = os.environ.get("SFT_PLUGINS_INSTALLED")
    assert named, "SFT_PLUGINS_INSTALLED names the Python of the environment: run `make test-install`"
    return Path(named).parent


@pytest.fixture(scope="session")
def wheel() -> Path:
    (path,) = (ROOT / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def sdist() -> Path:
    (path,) = (ROOT / "dist").glob("*.tar.gz")
    return path


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a folder outside the repository, without what make or pytest told Python of it."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )


def python(environment: Path, code: str, cwd: Path) -> str:
    done = run(environment / "python", "-c", code, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the archives -----------------------------------------------------------------------------------------------------


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {name: path.read_bytes() for name, path in tree().items()}


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    assert wheel.name == f"sft_plugins-{sft_plugins.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = Parser().parsestr(archive.read(name).decode())
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert wheel.name in (ROOT / "README.md").read_text(encoding="utf-8"), "its install line names another version"
    assert (said["Name"], said["Version"]) == ("sft-plugins", sft_plugins.__version__)
    assert said.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_the_source_distribution_installs_what_the_wheel_does(
    environment: Path, sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    """It is built here a second time, by the environment's own setuptools."""
    options = ["--no-deps", "--no-build-isolation", "--no-compile", "--target", tmp_path / "files"]
    done = run(environment / "python", "-m", "pip", "install", *options, sdist, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = (path for path in (tmp_path / "files" / "sft_plugins").rglob("*") if path.is_file())
    with zipfile.ZipFile(wheel) as archive:
        assert {path.relative_to(tmp_path / "files").as_posix(): path.read_bytes() for path in files} == {
            name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name
        }


def test_the_source_distribution_brings_its_licence_and_its_recipe(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


# --- the environment --------------------------------------------------------------------------------------------------


def test_it_is_the_installed_package_that_runs_and_no_extra_is_there(environment: Path, tmp_path: Path) -> None:
    code = """
import importlib.util, json, sft_plugins
extras = ("trl", "peft", "axolotl", "matplotlib", "sentence_transformers", "gguf", "pytest")
print(json.dumps([sft_plugins.__file__, [name for name in extras if importlib.util.find_spec(name)]]))
"""
    where, extras = json.loads(python(environment, code, tmp_path))
    assert Path(where).is_relative_to(environment.parent)
    assert extras == []


def test_every_module_imports_without_extras_but_what_a_host_alone_loads(environment: Path, tmp_path: Path) -> None:
    code = f"""
import importlib, json
outcomes = {{}}
for name in {modules()!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        outcomes[name] = error.name
print(json.dumps(outcomes))
"""
    outcomes = json.loads(python(environment, code, tmp_path).splitlines()[-1])
    # A module fails for want of the host that loads it, and of nothing else.
    missing = {"sft_plugins.integrations.axolotl.": "axolotl", "sft_plugins.integrations.swift": "swift"}
    assert {host for name, host in outcomes.items() if missing.get(_room(name, missing)) == host} == {
        "axolotl",
        "swift",
    }
    assert [name for name, host in outcomes.items() if missing.get(_room(name, missing)) != host] == []


def _room(name: str, rooms: Collection[str]) -> str:
    """The one of `rooms` that a module's name begins with; empty where none is."""
    return next((room for room in rooms if name.startswith(room)), "")


def test_the_public_names_are_there(environment: Path, tmp_path: Path) -> None:
    code = "import sft_plugins; print(sorted(getattr(sft_plugins, name).__name__ for name in sft_plugins.__all__))"
    assert python(environment, code, tmp_path).strip() == str(sorted(sft_plugins.__all__))


@pytest.mark.parametrize("command", [["sft-plugins"], ["python", "-m", "sft_plugins"]], ids=" ".join)
def test_the_command_line_answers(environment: Path, command: list[str], tmp_path: Path) -> None:
    program = [environment / command[0], *command[1:]]
    said = run(*program, "--version", cwd=tmp_path)
    assert (said.returncode, said.stdout.strip()) == (0, f"sft-plugins {sft_plugins.__version__}")
    for named in ([], *([name] for name in COMMANDS)):
        helped = run(*program, *named, "--help", cwd=tmp_path)
        assert helped.returncode == 0, helped.stderr
        assert " ".join(["sft-plugins", *named, "[OPTIONS]"]) in " ".join(helped.stdout.split())


def test_a_command_without_its_packages_says_how_to_install_them(environment: Path, tmp_path: Path) -> None:
    done = run(environment / "sft-plugins", "demo", cwd=tmp_path)
    assert done.returncode == 2
    assert "missing_package" in done.stderr
    assert "pip install" in done.stderr


def test_prompts_and_pages_come_from_the_installed_data(environment: Path, tmp_path: Path) -> None:
    assert (
        int(python(environment, "from sft_plugins.collapse import load_prompts; print(len(load_prompts()))", tmp_path))
        > 20
    )
    build_tokenizer("qwen").save_pretrained(tmp_path / "model")
    row = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello there."}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    done = run(
        environment / "sft-plugins", "inspect", "rows.jsonl", "--model", "model", "--html", "page.html", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<style>" in page
    assert "</html>" in page
