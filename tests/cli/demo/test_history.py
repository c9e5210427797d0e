"""The demo's sentence on Qwen 3's template: what it says is what masking and packing count."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft_plugins.cli.demo import history
from testkit.conversations import assistant, user
from testkit.tokenizers import build_tokenizer

ROWS = [
    {
        "messages": [
            message
            for i in range(turns)
            for message in (user(f"Question {i} of {turns}?" * 9), assistant(f"Answer {i}."))
        ]
    }
    for turns in (1, 5, 6)
]


def test_what_is_said_of_a_rewritten_history_is_counted() -> None:
    pytest.importorskip("trl")
    said = history.under_qwen3(build_tokenizer("qwen"), ROWS)
    assert said is not None
    assert "2 of these conversations are 11 rows" in said
    split, trees = map(float, re.findall(r"([\d.]+) times", said))
    assert split > 2 * trees > 2


def test_without_the_template_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for spec in (None, SimpleNamespace(origin=str(tmp_path / "__init__.py"))):
        monkeypatch.setattr(history, "find_spec", lambda _, spec=spec: spec)
        assert history.under_qwen3(build_tokenizer("qwen"), ROWS) is None
