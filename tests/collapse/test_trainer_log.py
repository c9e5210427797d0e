"""A record added to the trainer's log leaves what the trainer had asked for, also where a logger fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainerControl

from sft_plugins.collapse.trainer_log import log_through
from testkit.watched_runs import arguments, collate, rows, tiny_model


class Broken(TrainerCallback):
    def on_log(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("the tracker is away")


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_what_was_asked_for_is_asked_for_still(tmp_path: Path, asked: bool, fails: bool) -> None:
    """`on_log` handlers clear `should_log`, with which the trainer's own record of the same step is asked for."""
    callbacks = [Broken()] if fails else []
    trainer = Trainer(
        tiny_model(), arguments(tmp_path), train_dataset=rows(), data_collator=collate, callbacks=callbacks
    )
    own = TrainerControl(should_log=asked)
    trainer.control.should_log = not asked
    if fails:
        with pytest.raises(ConnectionError):
            log_through(trainer, own, {"collapse/level": 1.0})
    else:
        log_through(trainer, own, {"collapse/level": 1.0})
        assert trainer.state.log_history[-1]["collapse/level"] == 1.0
    assert (own.should_log, trainer.control.should_log) == (asked, not asked)
