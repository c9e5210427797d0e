"""The tests of a copy of the tree, with a fault in it: a process that has loaded the libraries forks, and the fork runs them.

A fork starts in no time, loads the copy's own modules, and is gone with whatever the fault has done to it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import Fault
from nearest import nearest

from testkit.house import imports

SECONDS_OF_A_TEST = 180  # of computing: one that goes on beyond is a loop without an end


@contextlib.contextmanager
def copy_of_the_tree(root: Path) -> Iterator[Path]:
    """What git knows of the tree, as it stands; `integrations` where an installed package has it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in listed.stdout.splitlines():
            if (root / name).is_file():
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, target)
        Path(folder, "sft_plugins", "integrations").symlink_to(Path("..", "integrations"))
        yield Path(folder)


class Tests:
    """The tests of a copy of the tree, run in forks; a test that fails without any fault is left out from then on."""

    def __init__(self, copy: Path, limit: float) -> None:
        self.copy, self.limit = copy, limit
        self._sound: dict[str, bool] = {}

    def notice(self, fault: Fault) -> dict[str, Any]:
        """What comes of `fault`: `killed` by the first test that fails, `time` in a test that does not end, `survived`.

        `cut` says of a survivor that its tests were not all run: the limit came first.
        """
        tests = nearest(fault.path, self.copy, fault.line)
        target = self.copy / fault.path
        source = target.read_text(encoding="utf-8")
        while True:
            target.write_text(fault.planted(source), encoding="utf-8")
            try:
                outcome = self._fork(tests)
            finally:
                target.write_text(source, encoding="utf-8")
            if outcome["outcome"] == "survived" or self._is_sound(outcome["by"], tests):
                return outcome

    def _is_sound(self, test: str, tests: list[str]) -> bool:
        if test not in self._sound:
            alone = self._fork([test if "::" in test else tests[0]])
            self._sound[test] = alone["outcome"] == "survived"
        if not self._sound[test] and "::" not in test:
            raise SystemExit(f"{tests[0]} fails without any fault: {test}")
        return self._sound[test]

    def _fork(self, tests: list[str]) -> dict[str, Any]:
        told = self.copy / "outcome.json"
        told.unlink(missing_ok=True)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            unsound = [name for name, sound in self._sound.items() if not sound]
            run_tests(self.copy, [*tests, *(f"--deselect={name}" for name in unsound)], told)
            os._exit(0)
        cut = True
        try:
            while cut and _computed(child) <= self.limit and time.monotonic() - began <= 10 * self.limit:
                cut = os.waitpid(child, os.WNOHANG)[0] == 0
                time.sleep(0.05)
        finally:  # the fork where it goes on, and what a test may have left behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            if cut:
                os.waitpid(child, 0)
        seconds = round(time.monotonic() - began)
        if cut:
            return {"outcome": "survived", "by": "", "cut": True, "seconds": seconds}
        # A fault that ends the process itself leaves no outcome, and is noticed.
        outcome = json.loads(told.read_text()) if told.exists() else {"outcome": "killed", "by": "the process ended"}
        return {**outcome, "seconds": seconds}


def _computed(process: int) -> float:
    """CPU seconds of a process and of those that it has waited for: a machine busy with other work cuts nothing short."""
    with contextlib.suppress(FileNotFoundError):  # gone in this moment
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def run_tests(copy: Path, arguments: list[str], told: Path) -> None:
    """In the fork: pytest on the copy, without a word; what came of it goes to `told`."""
    import pytest

    def tell(outcome: str, by: str) -> None:
        told.write_text(json.dumps({"outcome": outcome, "by": by}))

    class First:
        failed = ""

        def pytest_runtest_logstart(self, nodeid: str) -> None:
            def too_long(*_: object) -> None:
                tell("time", nodeid)
                os._exit(1)

            signal.signal(signal.SIGPROF, too_long)
            signal.setitimer(signal.ITIMER_PROF, SECONDS_OF_A_TEST)

        def pytest_runtest_logreport(self, report: Any) -> None:
            self.failed = self.failed or (report.nodeid if report.failed else "")

        def pytest_collectreport(self, report: Any) -> None:
            self.failed = self.failed or (f"import of {report.nodeid}" if report.failed else "")

    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    first = First()
    marks = "not slow and not gpu and not deepspeed"
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", marks, *arguments], plugins=[first])
    none = code == pytest.ExitCode.NO_TESTS_COLLECTED  # of the slow ones alone
    tell("survived" if code == 0 or none else "killed", first.failed or f"exit {int(code)}" * (code != 0 and not none))


def load_libraries(root: Path) -> None:
    """What the tree imports from elsewhere, once for all forks; nothing of the tree itself."""
    wanted: set[tuple[str, str]] = set()
    for place in (
        "sft_plugins",
        "tests/masking",
        "tests/packing",
        "tests/collapse",
        "tests/preflight",
        "tests/support",
    ):
        for path in (root / place).rglob("*.py"):
            wanted |= set(imports(path, root))
    for module, name in sorted(wanted):
        if module.partition(".")[0] not in ("sft_plugins", "integrations", "testkit", "axolotl", "faults", "nearest"):
            with contextlib.suppress(Exception):  # of another environment, or not installed
                getattr(importlib.import_module(module), name, None)
