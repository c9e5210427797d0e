"""Run targets of make one after another, whatever becomes of each, and end with one line for each and the tests they ran.

parts.py MAKE TARGET ...
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def counted(report: Path) -> Counter[str]:
    """passed, failed and skipped in pytest's own report; nothing where no pytest came to its end."""
    if not report.is_file():
        return Counter()
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    skipped = int(suite.attrib["skipped"])
    return Counter(passed=int(suite.attrib["tests"]) - failed - skipped, failed=failed, skipped=skipped)


def words(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))


def run(make: str, target: str, report: Path) -> int:
    options = f"{os.environ.get('PYTEST_ADDOPTS', '')} --junitxml={report}".strip()
    return subprocess.run(
        [make, "--no-print-directory", target], env={**os.environ, "PYTEST_ADDOPTS": options}, check=False
    ).returncode


def main(make: str, targets: Sequence[str]) -> int:
    lines, total, failed = [], Counter[str](), []
    with tempfile.TemporaryDirectory() as folder:
        for target in targets:
            report = Path(folder) / f"{target}.xml"
            print(f"\n--- make {target}", flush=True)
            started = time.monotonic()
            code = run(make, target, report)
            minutes, seconds = divmod(round(time.monotonic() - started), 60)
            counts = counted(report)
            total += counts
            failed += [target] if code else []
            lines.append(
                f"{target:24}{'FAILED' if code else 'passed'}  {minutes:3}:{seconds:02}"
                + (f"  {words(counts)}" if counts else "")
            )
    print("\n" + "\n".join(lines))
    if failed:
        print(f"make test: {len(failed)} of {len(targets)} parts failed: {', '.join(failed)}")
    print(words(total), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(130)
