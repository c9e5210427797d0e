"""Build one of make's environments exactly as its lock says, or write the lock of an environment that was tested.

    environment.py build FOLDER [--lock LOCK] --torch "torch==2.13.0" [--apart NAME] -- REQUIREMENT ...
    environment.py beside FOLDER [--lock LOCK] --environment FOLDER REQUIREMENT ...
    environment.py freeze FOLDER LOCK [--beside FOLDER]

A lock holds one `name==version` a line and says which Python it is for. torch is in no lock: TORCH chooses it, and its
build brings the CUDA libraries and triton that fit it. The file `.ready` is there exactly while the environment is whole;
without it the folder is made anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

READY = ".ready"
OURS = "sft-plugins"
CHOSEN_BY_TORCH = re.compile(r"torch|triton|cuda-.*|nvidia-(?!ml-py$).*")
HEADER = "# Written by `make lock` for Python {python}. TORCH chooses torch, with its CUDA libraries and triton.\n"


class Unbuildable(Exception):  # noqa: N818
    """Why the environment cannot be built, and what to do, in one line."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True)
class Lock:
    """The versions that were tested together on one minor version of Python."""

    path: Path
    python: str
    versions: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Lock:
        if not path.is_file():
            raise Unbuildable(f"{path} is not there: get it back with git, or write it with 'make lock'.")
        header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
        python = re.match(r"# .* for Python (\d+\.\d+)\.", header)
        if python is None:
            raise Unbuildable(f"{path}, line 1, does not say which Python it is for: write it anew with 'make lock'.")
        versions = {}
        for number, line in enumerate(lines, start=2):
            pin = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!_-]*)", line)
            if pin is None:
                raise Unbuildable(
                    f"{path}, line {number}: '{line}' is not name==version. Write it anew with 'make lock'."
                )
            versions[normal(pin[1])] = pin[2]
        return cls(path, python[1], versions)

    def fits(self, python: str) -> bool:
        return self.python == python

    def differences(self, installed: dict[str, str]) -> list[str]:
        """What is installed in another version than it says."""
        pinned = sorted(self.versions.keys() & installed.keys())
        return [
            f"{name} {installed[name]} (locked: {self.versions[name]})"
            for name in pinned
            if installed[name] != self.versions[name]
        ]

    def strangers(self, installed: dict[str, str]) -> list[str]:
        """What is installed and not in it."""
        return [
            f"{name} {installed[name]} (not locked)"
            for name in sorted(lockable(installed).keys() - self.versions.keys())
        ]


def lockable(installed: dict[str, str]) -> dict[str, str]:
    """Without this project, and without torch and what its build brings."""
    return {
        name: version for name, version in installed.items() if name != OURS and not CHOSEN_BY_TORCH.fullmatch(name)
    }


class Pip:
    """pip of one environment. What it builds from source is held to the lock as well as what it installs."""

    def __init__(self, python: Path, lock: Lock | None) -> None:
        self.python = python
        self.lock = lock

    def install(self, *arguments: str, isolated: bool = True) -> None:
        held = (
            [part for option in ("--constraint", "--build-constraint") for part in (option, str(self.lock.path))]
            if self.lock
            else []
        )
        # pip takes no constraints for a build that happens in the environment itself.
        # Bytecode is written when a module is first imported: most of what Axolotl depends on never is.
        self._run("install", "--no-compile", *(held if isolated else [*held[:2], "--no-build-isolation"]), *arguments)

    def install_itself(self) -> None:
        """The pip that a Python brings may be years old; this one reads the options above."""
        version = f"pip=={self.lock.versions['pip']}" if self.lock and "pip" in self.lock.versions else "pip"
        self._run("install", "--upgrade", version)

    def installed(self, *where: str) -> dict[str, str]:
        listed = subprocess.run(
            [*self._pip, "list", "--format=json", *where], capture_output=True, text=True, check=True
        )
        return {normal(entry["name"]): entry["version"] for entry in json.loads(listed.stdout)}

    @property
    def _pip(self) -> list[str]:
        return [str(self.python), "-m", "pip", "--disable-pip-version-check"]

    def _run(self, *arguments: str) -> None:
        print("pip", shlex.join(arguments), flush=True)
        if subprocess.run([*self._pip, *arguments], check=False).returncode == 0:
            return
        # pip gives one exit code to everything: whether an index answers is asked, not read from its English.
        question = [*self._pip, "--retries", "0", "--timeout", "20", "index", "versions", "pip"]
        if subprocess.run(question, capture_output=True, check=False).returncode != 0:
            raise Unbuildable(
                "no package index answers: connect to the network, or name a mirror in PIP_INDEX_URL, and type make again."
            )
        unlocked = (
            f" Where {self.lock.path} does not fit this machine, 'make LOCKS=' builds without it." if self.lock else ""
        )
        raise Unbuildable(
            f"pip could not install this; its reason stands above. Mend that and type make again.{unlocked}"
        )


def version_of(python: Path | str) -> str | None:
    """The minor version of an interpreter, or None where it does not run or has no pip."""
    code = "import pip, sys; print('%d.%d' % sys.version_info[:2])"
    try:
        asked = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def fitting(path: Path | None, python: str) -> Lock | None:
    """The lock, where there is one for this Python; what is built without one is said in one line."""
    if path is None:
        print("make: no lock is used: pip takes the newest releases that fit together.", flush=True)
        return None
    lock = Lock.read(path)
    if lock.fits(python):
        return lock
    print(
        f"make: {path} is for Python {lock.python}, this is {python}: pip resolves versions that were not tested together."
    )
    sys.stdout.flush()
    return None


def build(folder: Path, lock_path: Path | None, torch: str, requirements: Sequence[str], apart: Sequence[str]) -> None:
    running = ".".join(platform.python_version_tuple()[:2])
    lock = fitting(lock_path, running)
    python = folder / "bin" / "python"
    whole = (folder / READY).is_file() and version_of(python) == running
    if not whole:
        remake(folder)
    (folder / READY).unlink(
        missing_ok=True
    )  # until it is whole again: a killed pip leaves packages that look installed
    pip = Pip(python, lock)
    pip.install_itself()
    pip.install("--no-deps", *shlex.split(torch))
    pip.install(*requirements)
    if apart:
        pip.install("--no-deps", *apart)
    if lock:
        installed = pip.installed()
        # Into an environment that was whole, somebody may have installed tools of his own.
        if wrong := lock.differences(installed) + ([] if whole else lock.strangers(installed)):
            raise Unbuildable(
                f"this is not what {lock.path} says: {', '.join(wrong)}. Renew it: make test-newest, make lock."
            )
    (folder / READY).touch()


def remake(folder: Path) -> None:
    """An empty environment in place of whatever is there."""
    if folder.exists():
        print(f"make: {folder} was left half-built, or by another Python: it is made anew.", flush=True)
        shutil.rmtree(folder)
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        raise Unbuildable(
            f"'{sys.executable}' cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv): "
            + " ".join((made.stdout + made.stderr).split())
        )


def beside(folder: Path, environment: Path, lock_path: Path | None, requirements: Sequence[str]) -> None:
    """Packages in a folder of their own, without what they depend on: seen by nobody who does not ask for them."""
    python = environment / "bin" / "python"
    shutil.rmtree(folder, ignore_errors=True)
    lock = fitting(lock_path, version_of(python) or "unknown")
    Pip(python, lock).install("--no-deps", "--target", str(folder), *requirements, isolated=False)
    (folder / READY).touch()


def freeze(environment: Path, path: Path, beside_it: Path | None) -> None:
    """What is installed, as a lock."""
    python = environment / "bin" / "python"
    minor = version_of(python)
    if minor is None or not ((beside_it or environment) / READY).is_file():
        raise Unbuildable(f"{beside_it or environment} is not whole: type 'make lock' again.")
    installed = lockable(Pip(python, None).installed(*(["--path", str(beside_it)] if beside_it else [])))
    lines = [f"{name}=={version}\n" for name, version in sorted(installed.items())]
    path.write_text(HEADER.format(python=minor) + "".join(lines), encoding="utf-8")
    Lock.read(path)
    print(f"make: {path}: {len(lines)} versions for Python {minor}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "beside"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        command.add_argument("--lock", type=Path)
        command.add_argument("requirements", nargs="+")
    commands.choices["build"].add_argument("--torch", required=True)
    commands.choices["build"].add_argument("--apart", action="append", default=[], help="without what it depends on")
    commands.choices["beside"].add_argument("--environment", type=Path, required=True)
    command = commands.add_parser("freeze")
    command.add_argument("folder", type=Path)
    command.add_argument("path", type=Path)
    command.add_argument("--beside", type=Path)
    asked = parser.parse_args()
    try:
        if asked.command == "build":
            build(asked.folder, asked.lock, asked.torch, asked.requirements, asked.apart)
        elif asked.command == "beside":
            beside(asked.folder, asked.environment, asked.lock, asked.requirements)
        else:
            freeze(asked.folder, asked.path, asked.beside)
    except Unbuildable as problem:
        sys.exit(f"make: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
