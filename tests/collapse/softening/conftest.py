"""The base model of runs to soften."""

from __future__ import annotations

from pathlib import Path

import pytest

from testkit.watched_runs import saved_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("base") / "model")
