"""One training under watch, from the look before its first step to its report: looks that the budget allows, and what follows.

Invariant: every failure before the first step stops the run from starting with a watcher that cannot see, and every
    later one ends the probe, not the training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from sft_plugins._models import is_sharded
from sft_plugins._preserve import untouched
from sft_plugins.collapse.detect.verdict import Verdict
from sft_plugins.collapse.distributed import Ranks, free_memory, is_out_of_memory
from sft_plugins.collapse.monitor import Monitor, ProbeResult
from sft_plugins.collapse.options import WatchOptions
from sft_plugins.collapse.probe.probe import Prober
from sft_plugins.collapse.probe.prompts import Prompt
from sft_plugins.collapse.schedule import Schedule
from sft_plugins.collapse.trainer_log import Console
from sft_plugins.errors import CollapseError

__all__ = ["Session"]

logger = logging.getLogger(__name__)
_HALVINGS = 3


class Log(Protocol):
    """Hands figures to the trainer's loggers."""

    def __call__(self, control: TrainerControl, values: dict[str, float], *, step: int | None = None) -> None: ...


class Session:
    """What `ModeCollapseCallback` drives between `on_train_begin` and `on_train_end`."""

    monitor: Monitor
    schedule: Schedule

    def __init__(
        self,
        options: WatchOptions,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        *,
        log: Log,
        clock: Callable[[], float],
    ) -> None:
        self._options, self._tokenizer, self._prompts, self._log, self._clock = options, tokenizer, prompts, log, clock
        self.ranks = Ranks()
        self.console = Console(self.ranks)
        self.verdict: Verdict | None = None
        self._probed: dict[int, int] = {}

    def begin(self, model: Any, args: TrainingArguments, state: TrainerState) -> dict[str, float]:
        """Look at the model before its first step; the figures for the loggers.

        Raises:
            CollapseError: whatever would keep the watcher from watching.
        """
        began = self._clock()
        first = self.ranks.rank == 0
        if is_sharded(model):
            raise CollapseError(
                "the weights are divided among processes (FSDP or DeepSpeed ZeRO-3), and the watch looks at whole ones",
                code="sharded",
                remedy="train with DDP, or {no_watch:remove the callback}; training has not started",
            )
        if not self._tokenizer.chat_template:
            self.console.say("collapse: the tokenizer has no chat template, so prompts are given as plain text.")
        self.schedule = Schedule(
            max_steps=state.max_steps,
            every_steps=self._options.every_steps,
            budget=self._options.budget,
            start_step=state.global_step,
            started=began,
            clock=self._clock,
        )
        with untouched(model, self._tokenizer):
            prober = Prober(
                model,
                self._tokenizer,
                self._prompts,
                ranks=self.ranks,
                show=first and not args.disable_tqdm,
                **self._options.of_probes,
            )
        prober.autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        monitor = Monitor(
            prober,
            ranks=self.ranks,
            folder=Path(self._options.output_dir)
            if self._options.output_dir
            else Path(args.output_dir or ".") / "collapse",
            step=state.global_step,
            detector=self._options.detector,
            say=self.console.say,
        )
        values = monitor.begin(model, options=self._options)
        taken = prober.baseline
        self.schedule.prepaid(
            self._clock() - began, price=0.0 if taken is None else taken.seconds * prober.k / prober.k_base
        )
        self.monitor = monitor
        return values

    def look(
        self, state: TrainerState, control: TrainerControl, model: Any, *, final: bool, step: int | None = None
    ) -> None:
        """Probe as far as the budget allows, once per step and tier. `step` is the weights' own, the trainer's if left out."""
        monitor = self.monitor
        step = state.global_step if step is None else step
        tier = self.ranks.from_first(lambda: self.schedule.tier(step, final=final))
        if tier == 1 and not monitor.reads:
            tier = 0
        self.schedule.pending = tier < 2
        if tier <= self._probed.get(step, 0):
            return
        self._probed[step] = tier
        with self.schedule.paying(tier):
            result = self.guarded("probe", state, lambda: self._attempt(monitor, model, step, state, tier))
        if result is None:
            self.schedule.pending = True
            return
        self.verdict = result.verdict
        self.guarded("log", state, lambda: self._log(control, result.values, step=step))
        self._act(result, state, control)

    def _attempt(self, monitor: Monitor, model: Any, step: int, state: TrainerState, tier: int) -> ProbeResult:
        """The probe, with smaller batches where memory runs out; ranks agree on that, too."""
        epoch = state.epoch if step == state.global_step else None
        for _ in range(_HALVINGS):
            try:
                return monitor.probe(model, step=step, epoch=epoch, tier=tier)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                monitor.prober.shrink()
            free_memory()
        return monitor.probe(model, step=step, epoch=epoch, tier=tier)

    def _act(self, result: ProbeResult, state: TrainerState, control: TrainerControl) -> None:
        verdict = result.verdict
        self.console.tell(result)
        if verdict.level not in ("warn", "critical") or result.tier < 2:
            return
        if callable(self._options.on_collapse):
            call = self._options.on_collapse
            self.guarded("on_collapse", state, lambda: call(verdict))
        elif self._options.on_collapse == "stop" and verdict.level == "critical":
            self.console.say(f"collapse: training stops at step {result.step}, as on_collapse='stop' asks.")
            control.should_training_stop = True

    def finish(self, state: TrainerState) -> None:
        """Write the end of the history, and the report."""
        monitor = self.monitor
        if self.ranks.rank:
            return
        cost, step = self.schedule.summary(), state.global_step
        monitor.history.append(
            "end", step=step, cost=cost, budget=self._options.budget, kept=state.best_model_checkpoint
        )
        path = monitor.history.path
        if self._options.report and path is not None:
            from sft_plugins.collapse.report.page import write_report

            with self.schedule.paying(0):
                page = write_report(path, path.parent)
            self.console.say(f"collapse: report in {page}")
        self.console.tell_cost(self.schedule.summary(), self._options.budget)

    def guarded(self, stage: str, state: TrainerState, work: Callable[[], Any]) -> Any:
        """`work()`, or None: after step 0 nothing that goes wrong here may end the training."""
        try:
            return work()
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            logger.debug("collapse: %s failed", stage, exc_info=True)
            self.console.say_once(f"collapse: {stage} failed at step {state.global_step}; training goes on. {words}")
            self.monitor.history.append("problem", step=state.global_step, stage=stage, message=words)
            return None
