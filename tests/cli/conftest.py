"""What the command line's tests share: a model folder, and the terminal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

from testkit.commands import model_folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, which no command changes."""
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def rich_reads_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Dataset.map(num_proc=…)` puts a copy in the place of `os.environ` (datasets 5.2), and rich goes on reading the one
    that it was imported with: after such a test no width or colour set here would reach it."""
    monkeypatch.setattr(Console, "_environ", os.environ)
