"""`ModeCollapseCallback`: watches how far a model's entropy and variety fall below where training started.

The run is the same, bit for bit, as without the callback (weights, optimizer, log history but for added
records). What moves in a probe is put back before anything else happens (`_preserve.py`); logging goes around the host's
own metrics (`trainer_log.py`); every failure after step 0 ends the probe, not the training, and every failure before it
stops the run from starting with a watcher that cannot see.

    trainer = SFTTrainer(model, train_dataset=rows, callbacks=[ModeCollapseCallback(tokenizer, prompts)])
    trainer.train()     # collapse/diversity_retained, _lo, _hi … in its loggers; <output_dir>/collapse/report.html
"""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sft_plugins.collapse.detect.verdict import DetectorConfig, Verdict
from sft_plugins.collapse.metrics.refusals import BUILTIN, boilerplate_patterns
from sft_plugins.collapse.options import WatchOptions
from sft_plugins.collapse.probe.figures import PREFIX
from sft_plugins.collapse.probe.prompts import load_prompts
from sft_plugins.collapse.session import Session
from sft_plugins.collapse.trainer_log import find_trainer, log_through
from sft_plugins.errors import CollapseError

__all__ = ["ModeCollapseCallback"]


class ModeCollapseCallback(TrainerCallback):
    """A callback for any `transformers.Trainer`, TRL's included, that measures collapse and changes nothing else.

    At every probe the model answers `prompts`, K times each at temperature 1, and reads the held-out pairs. What is kept
    of the baseline's variety of meaning and of its entropy is told with intervals; an alarm needs two probes in a row.

    Args:
        tokenizer: the tokenizer training uses; never changed.
        prompts: a list, a dataset, the path of a JSONL file (`load_prompts` says of what), or None for the built-in set.
        eval_pairs: held-out rows, tokenised (`input_ids`, `labels`) or anything `PromptMasker` reads. They give held-out
            loss, calibration and the forks; without them forks are sought in the baseline's own answers.
        every_steps: probe at every multiple of this; None for log-spaced steps.
        samples_per_prompt: answers per prompt and probe (K); the baseline takes 16 at least.
        max_new_tokens: longest answer, in tokens.
        baseline: what is compared with: `"auto"` (the adapter off, or the model as training begins, kept on disk), the
            path of a baseline file, or None for nothing, and then no alarm.
        embedder: what tells meanings apart: `"auto"` (the English sentence encoder of the extra `semantic`; where it is
            missing or cannot read the answers, as `"model"`), `"model"` (hidden states of the base under a LoRA adapter),
            the name or folder of a sentence-transformers model (a multilingual one, say), a function or an object with
            `.encode` from N strings to an array `[N, D]`, or None for nothing, and then no alarm.
        on_collapse: `"warn"` prints; `"stop"` also ends training at a confirmed `critical`; a callable is given the
            `Verdict` whenever its level is `warn` or `critical`.
        output_dir: for history, baseline and report; None for `<training output_dir>/collapse`.
        seed: of the samples.
        budget: largest share of wall time, 0.03 for 3 %; None for no limit. Probes without answers take a third of it at
            most.
        max_eval_pairs: how many of `eval_pairs` are read at each probe.
        detector: bands, persistence and resampling; `DetectorConfig()` if left out.
        boilerplate: regular expressions of refusals and empty phrases; the word `"builtin"` stands for those built in.
        tools, chat_template_kwargs: what rows of data carry for the chat template (`{"enable_thinking": False}`), for every
            prompt that carries none of its own.
        stop_token_ids: ids that end an answer, as for `PromptMasker`; None for what the tokenizer and its template tell.
        report: whether `report.html` and its pictures are written at the end.
        clock: gives seconds; for tests.

    Raises:
        CollapseError: here and in `on_train_begin`, when something is set up wrong. Never later.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: str | Path | Iterable[Any] | None = None,
        *,
        eval_pairs: Any = None,
        every_steps: int | None = None,
        samples_per_prompt: int = 8,
        max_new_tokens: int = 128,
        baseline: str | Path | None = "auto",
        embedder: Any = "auto",
        on_collapse: Literal["warn", "stop"] | Callable[[Verdict], Any] = "warn",
        output_dir: str | Path | None = None,
        seed: int = 0,
        budget: float | None = 0.03,
        max_eval_pairs: int = 64,
        detector: DetectorConfig | None = None,
        boilerplate: Sequence[str] = (BUILTIN,),
        tools: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        stop_token_ids: Iterable[int] | None = None,
        report: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._options = WatchOptions(
            eval_pairs=eval_pairs,
            every_steps=every_steps,
            samples_per_prompt=samples_per_prompt,
            max_new_tokens=max_new_tokens,
            baseline=baseline,
            embedder=embedder,
            on_collapse=on_collapse,
            output_dir=output_dir,
            seed=seed,
            budget=budget,
            max_eval_pairs=max_eval_pairs,
            detector=detector or DetectorConfig(),
            patterns=boilerplate_patterns(boilerplate),
            stop_token_ids=None if stop_token_ids is None else tuple(stop_token_ids),
            report=report,
        )
        if tokenizer is None or not callable(tokenizer) or not hasattr(tokenizer, "decode"):
            raise CollapseError(
                f"tokenizer is {type(tokenizer).__name__}, not a tokenizer",
                code="bad_option",
                remedy="pass the tokenizer that training uses, as AutoTokenizer.from_pretrained gives it",
            )
        self.prompts = load_prompts(prompts, tools=tools, chat_template_kwargs=chat_template_kwargs)
        self._tokenizer, self._clock = tokenizer, clock
        self._trainer: weakref.ref[Trainer] | None = None
        self._session: Session | None = None
        self._active = False

    def attach(self, trainer: Trainer) -> ModeCollapseCallback:
        """Hand over the trainer, and join its callbacks if not among them. Only needed where it cannot be found."""
        self._trainer = weakref.ref(trainer)
        if not any(c is self for c in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        return self

    @property
    def history_path(self) -> Path | None:
        """The run's JSONL file, once training has begun and where it can be written."""
        return None if self._session is None else self._session.monitor.history.path

    @property
    def verdict(self) -> Verdict | None:
        """The verdict after the last probe."""
        return None if self._session is None else self._session.verdict

    # --- events: (args, state, control) come by position, the rest by name ----------------------------------------

    def on_init_end(self, *_: Any, **__: Any) -> None:
        self._find()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        self._find()
        self._session, self._active = None, False
        try:
            session, values = self._set_up(model, args, state)
        except CollapseError:
            raise
        except Exception as error:
            raise CollapseError(
                f"the first look at the model failed: {type(error).__name__}: {error}",
                code="setup",
                remedy="training has not started; {no_watch:remove the callback}, or fix what is named here",
            ) from error
        self._session, self._active = session, True
        self._log(control, values)

    def on_log(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, *, logs: Any = None, **_: Any
    ) -> None:
        session = self._session
        if self._active and session and logs and not any(name.startswith(PREFIX) for name in logs):
            with session.schedule.paying(0):
                session.guarded("log", state, lambda: session.monitor.trainer_logged(state.global_step, logs))

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        session = self._session
        if not self._active or session is None:
            return
        last = _is_last(state, control)
        # An evaluation of this very step comes next; looking after it puts its loss beside the probe's figures.
        if not control.should_evaluate and (last or session.schedule.slot(state.global_step)):
            session.look(state, control, model, final=last)

    def on_evaluate(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        session = self._session
        if self._active and session is not None and state.global_step > session.monitor.start_step:
            session.look(state, control, model, final=_is_last(state, control))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        session = self._session
        if not self._active or session is None:
            return
        step = _step_of_the_weights(args, state)
        if step > session.monitor.start_step:
            session.look(state, control, model, final=True, step=step)
        if step != state.global_step:
            session.console.say(
                f"collapse: the trainer has put the weights of step {step} back; the last look is at those."
            )
        session.guarded("end", state, lambda: session.finish(state))
        self._active = False

    # --- work ---------------------------------------------------------------------------------------------------------

    def _set_up(self, model: Any, args: TrainingArguments, state: TrainerState) -> tuple[Session, dict[str, float]]:
        session = Session(self._options, self._tokenizer, self.prompts, log=self._log, clock=self._clock)
        return session, session.begin(model, args, state)

    def _find(self) -> None:
        if self._trainer is None or self._trainer() is None:
            found = find_trainer(self)
            self._trainer = None if found is None else weakref.ref(found)

    def _log(self, control: TrainerControl, values: dict[str, float], *, step: int | None = None) -> None:
        trainer, session = None if self._trainer is None else self._trainer(), self._session
        if trainer is None and session is not None:
            session.console.say_once(
                "collapse: this host hides its trainer from callbacks, so figures go to the console and to "
                "history.jsonl but not to its loggers. Call callback.attach(trainer) before trainer.train()."
            )
        elif trainer is not None and values:
            log_through(trainer, control, values, step=step)


def _step_of_the_weights(args: TrainingArguments, state: TrainerState) -> int:
    """The step at which the weights at hand were trained: at the end `load_best_model_at_end` puts earlier ones back (C15)."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return state.global_step
    named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", Path(state.best_model_checkpoint).name)
    best = getattr(state, "best_global_step", None) or (int(named.group(1)) if named else None)
    return state.global_step if best is None or not Path(state.best_model_checkpoint).exists() else int(best)


def _is_last(state: TrainerState, control: TrainerControl) -> bool:
    return state.global_step >= state.max_steps or control.should_training_stop
