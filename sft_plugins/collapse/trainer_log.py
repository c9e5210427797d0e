"""The trainer, from the inside of a callback: finding it, and logging through it without touching its own records.

transformers hands a callback the model, the tokenizer and the dataloaders, but not the trainer, and only the trainer
can write to its loggers. Its callback handler, though, calls from within a method of the trainer, so the trainer is a
few frames up the stack. That only reads; where it fails (a wrapper runs callbacks elsewhere),
`ModeCollapseCallback.attach(trainer)` is the way.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from transformers import Trainer, TrainerCallback, TrainerControl

__all__ = ["find_trainer", "log_through"]

_FRAMES = 12


def find_trainer(callback: TrainerCallback) -> Trainer | None:
    """The trainer whose callback handler is calling `callback` right now; None where there is none near."""
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer):
            # During Trainer.__init__ the handler exists before its callbacks hear of it.
            handler = getattr(candidate, "callback_handler", None)
            if handler is not None and any(c is callback for c in handler.callbacks):
                return candidate
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def log_through(trainer: Trainer, control: TrainerControl, values: Mapping[str, float]) -> None:
    """Add one record to the trainer's log history and loggers, and leave its own next record as it would have been
    (C3).

    `Trainer.log` is called as the base class has it: TRL's own `log` empties the window of metrics that its next record
    averages. And the handler clears `should_log`, with which the trainer's own record of this very step is asked for.
    """
    ours, theirs = control.should_log, trainer.control.should_log
    try:
        Trainer.log(trainer, dict(values))
    finally:
        control.should_log, trainer.control.should_log = ours, theirs
