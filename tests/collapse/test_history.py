"""Which records of a history are the run's: those that a resumed run took back are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_plugins._report import plain
from sft_plugins.collapse.history import History, read_history
from sft_plugins.errors import CollapseError


def written(folder: Path, *records: tuple[str, int]) -> Path:
    history = History(folder / "history.jsonl")
    for kind, step in records:
        history.append(kind, step=step)
    return folder / "history.jsonl"


@pytest.mark.parametrize(
    ("resumed_at", "kept"),
    [
        (0, [("run", 0)]),  # a run of its own, in a folder used before
        (3, [("run", 0), ("run", 3)]),
        (4, [("run", 0), ("probe", 4), ("run", 4)]),  # what was seen at the checkpoint's own step stays
        (7, [("run", 0), ("probe", 4), ("run", 7)]),
        (8, [("run", 0), ("probe", 4), ("probe", 8), ("run", 8)]),
        (9, [("run", 0), ("probe", 4), ("probe", 8), ("run", 9)]),
    ],
)
def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(
    tmp_path: Path, resumed_at: int, kept: list[tuple[str, int]]
) -> None:
    path = written(tmp_path, ("run", 0), ("probe", 4), ("probe", 8), ("end", 8), ("run", resumed_at))
    assert [(record["kind"], record["step"]) for record in read_history(path)] == kept


def test_a_history_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CollapseError, match="holds no run") as caught:
        read_history(written(tmp_path, ("probe", 4)))
    assert caught.value.code == "history_file"


def test_numbers_that_json_does_not_know_are_nulls_at_any_depth() -> None:
    assert plain({1: [float("nan"), (float("-inf"), 0.5)]}) == {"1": [None, [None, 0.5]]}
