"""The command line under test: run in this process, or as a program; small data and a model folder for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from sft_plugins.cli import app
from testkit.patience import HANGS
from testkit.tiny_training import ANSWERS
from testkit.tokenizers import build_tokenizer


def invoke(*arguments: object) -> Result:
    """`sft-plugins ARGUMENTS` in this process; no exception but an exit is let through."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def program(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`sft-plugins ARGUMENTS` as a program of its own, its output piped."""
    code = "import sys; from sft_plugins.cli import app; app(prog_name='sft-plugins')"
    variables = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS")} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=HANGS)


def conversations(count: int) -> list[dict[str, Any]]:
    """Rows of one question and one answer; lengths differ from row to row."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}? " + "Please say. " * (i % 7)},
                {"role": "assistant", "content": ANSWERS[i % 4] * (1 + i % 3)},
            ]
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@cache
def chat_tokenizer() -> Any:
    """ChatML on a byte-level vocabulary of a few hundred tokens."""
    return build_tokenizer("bytelevel", eos="<|im_end|>")


def model_folder(path: Path) -> Path:
    """A folder that holds a tokenizer, which is all that inspect, audit and pack load."""
    chat_tokenizer().save_pretrained(path)
    return path
