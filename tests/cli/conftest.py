"""The terminal of the command line's tests."""

from __future__ import annotations

import os

import pytest
from rich.console import Console


@pytest.fixture(autouse=True)
def rich_reads_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Dataset.map(num_proc=…)` puts a copy in the place of `os.environ` (datasets 5.2), and rich goes on reading the one
    that it was imported with: after such a test no width or colour set here would reach it."""
    monkeypatch.setattr(Console, "_environ", os.environ)
