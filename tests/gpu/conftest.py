"""On CUDA the variable-length kernel is torch's own; elsewhere its stand-in serves every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from testkit.devices import kernel_calls


@pytest.fixture(autouse=True)
def calls() -> Iterator[list[Any]]:
    """One entry per call of the variable-length kernel."""
    with kernel_calls() as made:
        yield made
