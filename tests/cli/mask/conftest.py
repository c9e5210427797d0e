"""Data for `sft-plugins mask`."""

from __future__ import annotations

from pathlib import Path

import pytest

from testkit.commands import conversations, write_jsonl
from testkit.written_rows import COUNT


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", conversations(COUNT))
