"""Tests of packages that stand beside the environments: `make test` installs DeepSpeed for these tests and no others.

Wherever it can be imported, accelerate, transformers and PEFT import it; the rest is to run as most users run it, without.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

DEEPSPEED = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: `make test` runs it by itself, with it"
    ),
]


def needs_deepspeed(test: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of one test; a whole file takes `DEEPSPEED` into its `pytestmark`."""
    for mark in DEEPSPEED:
        test = mark(test)
    return test
