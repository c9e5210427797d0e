"""Where the watch's figures and words go: the trainer's own loggers, and the console.

transformers hands a callback no trainer, and only the trainer can write to its loggers. But its callback handler calls
from within a method of the trainer, so the trainer is a few frames up the stack. That only reads; where it fails (a
wrapper runs callbacks elsewhere), `ModeCollapseCallback.attach(trainer)` is the way.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import Trainer, TrainerCallback, TrainerControl

from sft_plugins.collapse.detect.verdict import BLIND, NO_LEVEL, percent
from sft_plugins.collapse.distributed import Ranks
from sft_plugins.collapse.monitor import ProbeResult

__all__ = ["Console", "find_trainer", "log_through"]

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


def log_through(
    trainer: Trainer, control: TrainerControl, values: Mapping[str, float], *, step: int | None = None
) -> None:
    """Add one record to the trainer's log history and loggers, and leave its own next record as it would have been
    (C3). `step` is the weights' own, where that is not the trainer's.

    `Trainer.log` is called as the base class has it: TRL's own `log` empties the window of metrics that its next record
    averages. And the handler clears `should_log`, with which the trainer's own record of this very step is asked for.
    """
    ours, theirs, at = control.should_log, trainer.control.should_log, trainer.state.global_step
    try:
        trainer.state.global_step = at if step is None else step
        Trainer.log(trainer, dict(values))
    finally:
        control.should_log, trainer.control.should_log, trainer.state.global_step = ours, theirs, at


class Console:
    """What the user is told: by rank 0 alone, between the lines of a progress bar, and the same thing once.

    One object per training, so that a second training tells everything again.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._silent = ranks.rank != 0
        self._told: set[str] = set()

    def say(self, message: str) -> None:
        if not self._silent:
            tqdm.write(message)

    def say_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self.say(message)

    def tell(self, result: ProbeResult) -> None:
        """The level after a probe with answers, and each alarm when it is first seen, confirmed, or changes its level."""
        verdict = result.verdict
        if result.tier == 2:
            self.say(f"collapse: step {result.step}: {_level(result)}")
        for finding in (*verdict.findings, *verdict.pending):
            certain = finding in verdict.findings
            key = f"{finding.code} {finding.level} {certain}"  # the evidence differs from probe to probe
            if finding.level in ("warn", "critical") and key not in self._told:
                self._told.add(key)
                tail = finding.suggestion if certain else "To be confirmed by the next probe."
                self.say(f"collapse: {finding.level.upper()} {finding.code}: {finding.evidence}. {tail}")

    def tell_cost(self, cost: Mapping[str, float], budget: float | None) -> None:
        """What watching took, from `Schedule.summary`."""
        limit = "no budget" if budget is None else f"budget {budget:.1%}"
        over = budget is not None and cost["share"] > budget
        self.say(
            f"collapse: {cost['probes_tier2']:.0f} probes with answers, {cost['probes_tier1']:.0f} without; "
            f"{cost['seconds']:.1f} s = {cost['share']:.1%} of {cost['wall_seconds']:.0f} s wall time ({limit}), "
            f"tiers 0 and 1 {cost['share_tier01']:.2%}."
            + (" Over budget: the run was too short for its baseline and one look at the end." if over else "")
        )


def _level(result: ProbeResult) -> str:
    verdict = result.verdict
    if verdict.level == NO_LEVEL:
        return "no verdict: " + "; ".join(finding.evidence for finding in verdict.findings if finding.code in BLIND)
    kept = verdict.estimates.get("diversity_retained")
    if kept is None:
        return verdict.level
    interval = f"{percent(kept.lo)} to {percent(kept.hi)}"
    return f"open answers keep {percent(kept.value)} of their diversity ({interval}): {result.verdict.level}"
