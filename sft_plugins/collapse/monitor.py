"""One run under watch: its baseline, its probes, its verdicts and its history. Knows no trainer; `callback.py` drives
it.

Invariant: every method that takes a model leaves it, the tokenizer and all random states as they were
    (`_preserve.untouched`), and every rank leaves every method having made the same exchanges.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from sft_plugins._preserve import untouched
from sft_plugins._report import plain
from sft_plugins.collapse.detect.bootstrap import FEW_PROMPTS
from sft_plugins.collapse.detect.comparison import estimate
from sft_plugins.collapse.detect.detector import Detector
from sft_plugins.collapse.detect.verdict import LEVELS, DetectorConfig, Probe, Verdict
from sft_plugins.collapse.distributed import Ranks
from sft_plugins.collapse.history import SCHEMA, History, config_hash, read_history
from sft_plugins.collapse.options import WatchOptions, figures_hash, keep_asked
from sft_plugins.collapse.probe import figures
from sft_plugins.collapse.probe.baseline import Baseline
from sft_plugins.collapse.probe.probe import Look, Prober
from sft_plugins.collapse.start import Start
from sft_plugins.errors import CollapseError

__all__ = ["Monitor", "ProbeResult"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe brought: values for the loggers and the verdict after it (of the last tier-2 probe)."""

    step: int
    tier: int
    values: dict[str, float]
    verdict: Verdict


class Monitor:
    """A run from its first step, or from the step it resumes at.

    Args:
        prober: what is asked, and how.
        folder: where history and baseline go; None for nowhere.
        step: 0, or the step that the run resumes from.
        say: how the user is told something.
    """

    def __init__(
        self,
        prober: Prober,
        *,
        ranks: Ranks,
        folder: Path | None,
        step: int,
        detector: DetectorConfig,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self.prober, self.ranks, self.config, self.say = prober, ranks, detector, say
        self.folder = self._usable(folder)
        self.start_step = step
        self.history = History(None if self.folder is None or ranks.rank else self.folder / "history.jsonl")
        self.base: Look | None = None
        self.detector = Detector(None, config=detector)
        self._probes: list[Probe] = []
        self._logs: list[dict[str, Any]] = []

    def begin(
        self,
        model: nn.Module,
        *,
        options: WatchOptions,
    ) -> dict[str, float]:
        """Take or load the baseline and write the head of the history. Returns the baseline's figures for the loggers.

        Raises:
            CollapseError: whatever would keep the watcher from watching.
        """
        before = self.ranks.from_first(self._earlier)
        start = Start(self.prober, ranks=self.ranks, folder=self.folder, step=self.start_step, say=self.say)
        with untouched(model, self.prober.tokenizer):
            taken, origin = start.settle(model, embedder=options.embedder, baseline=options.baseline, before=before)
            self.base = self.prober.use_baseline(taken, self.config)
        taken = self.prober.baseline
        if taken is None:
            self.say(f"collapse: no baseline: {origin}. Figures are logged, but nothing can be compared.")
        elif taken.problem is not None:
            self.say(f"collapse: the baseline cannot serve, so narrowing cannot be judged: {taken.problem}")
        elif self.prober.meaning.out_of_range is not None:
            self.say(
                f"collapse: narrowing cannot be seen: {self.prober.meaning.out_of_range}. Pass embedder= the name of a "
                "multilingual sentence-transformers model."
            )
        asked = sum(prompt.tag == "open" for prompt in self.prober.prompts)
        if taken is not None and asked < FEW_PROMPTS:
            self.say(
                f"collapse: {asked} open prompts: intervals of so few are too narrow now and then; {FEW_PROMPTS} or more give "
                "an alarm worth trusting."
            )
        self._write_head(options.record(self.prober.prompts), taken, origin, before)
        self._keep_asked(model, options)
        return {} if self.base is None else figures.flatten(figures.figures(self.base, None), {})

    @property
    def reads(self) -> bool:
        """Whether there is anything for tier 1 to read."""
        return bool(self.prober.rows) or self.prober.baseline is not None

    def probe(self, model: nn.Module, *, step: int, epoch: float | None, tier: int) -> ProbeResult:
        """Look, judge, write. Raises what the look raises, on every rank."""
        with untouched(model, self.prober.tokenizer):
            look = self.prober.look(model, tier)
        return self.ranks.from_first(lambda: self._judge(look, step=step, epoch=epoch))

    def trainer_logged(self, step: int, logs: dict[str, Any]) -> None:
        """Tier 0: keep what the trainer itself reports."""
        known = ("loss", "entropy", "eval_loss", "eval_entropy", "mean_token_accuracy", "eval_mean_token_accuracy")
        kept = {k: float(v) for k, v in logs.items() if k in known and isinstance(v, (int, float))}
        if kept and self.ranks.rank == 0:
            self._logs.append(self.history.append("log", step=step, **kept))

    def _judge(self, look: Look, *, step: int, epoch: float | None) -> ProbeResult:
        found = figures.to_probe(look, self.base, step=step)
        base = self.detector.baseline
        if any(
            probe.step >= step for probe in self._probes
        ):  # earlier weights were put back: their past is judged, no more
            self._start_detector(base, [probe for probe in self._probes if probe.step < step])
        verdict = self.detector.add(found)
        self._probes.append(found)
        # Of a probe with answers, the verdict has them already.
        intervals = verdict.estimates if look.measures is not None else {}
        if base is not None and not intervals:
            intervals = estimate(base, found, config=self.config)
        values = figures.figures(look, self.base) | figures.trainer_figures(self._logs)
        flat = figures.flatten(values, intervals)
        if look.measures is not None and verdict.level in LEVELS:
            flat[figures.PREFIX + "level"] = float(LEVELS.index(verdict.level))
        self.history.append(
            "probe",
            step=step,
            epoch=epoch,
            tier=look.tier,
            values=values,
            intervals={name: [e.value, e.lo, e.hi] for name, e in intervals.items()},
            verdict=verdict.to_json(),
            **self._look_record(look, found),
        )
        return ProbeResult(step=step, tier=look.tier, values=flat, verdict=verdict)

    def _look_record(self, look: Look, found: Probe) -> dict[str, Any]:
        return {
            "by_position": figures.by_position(look),
            "out_of_range": look.out_of_range,
            "reading": None if look.reading is None else look.reading.to_json(),
            "measures": None if look.measures is None else look.measures.to_json(),
            "fork_entropy": found.fork_entropy,
            "fork_entropy_base": found.fork_entropy_base,
            "heldout_loss": found.heldout_loss,
            "nonfinite": found.nonfinite,
            "samples": [
                [{"text": s.text, "tokens": len(s.token_ids), "truncated": s.truncated, "seed": s.seed} for s in group]
                for group in (self.prober.by_prompt(look.samples) if look.samples else [])
            ],
        }

    def _write_head(
        self, config: dict[str, Any], taken: Baseline | None, origin: str, before: list[dict[str, Any]]
    ) -> None:
        head: dict[str, Any] = plain(
            {
                "config": config,
                "embedder": self.prober.meaning.label,
                "eval_pairs": len(self.prober.rows),
            }
        )
        earlier = next((r for r in reversed(before) if r["kind"] == "run"), None)
        anew = earlier is not None and figures_hash(earlier) != figures_hash(head)
        if anew:
            before = []
            self.say(
                f"collapse: the run resumes at step {self.start_step} with other prompts, sampling, held-out pairs or another "
                "embedder, so what was seen before cannot be compared: the watch begins anew here."
            )
        self.history.append(
            "run",
            **head,
            anew=anew,
            schema=SCHEMA,
            id=uuid.uuid4().hex[:12],
            step=self.start_step,
            config_hash=config_hash(config),
            detector=dataclasses.asdict(self.config),
            prompts=[{"id": p.id, "text": p.text, "tag": p.tag} for p in self.prober.prompts],
            samples_per_prompt=self.prober.k,
            max_new_tokens=self.prober.generation.max_new_tokens,
            seed=self.prober.seed,
            baseline=None
            if taken is None
            else {"kind": taken.kind, "key": taken.key, "origin": origin, "problem": taken.problem},
            no_baseline=origin if taken is None else None,
            versions={"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
            python=platform.python_version(),
        )
        found = None
        if self.base is not None:
            found = figures.to_probe(self.base, self.base, step=0)
            values = figures.figures(self.base, None)
            if not any(r["kind"] == "baseline" for r in before):
                self.history.append("baseline", step=0, values=values, **self._look_record(self.base, found))
        # A resumed run is judged with the probes it had made before.
        self._probes = [figures.probe_from_record(record) for record in before if record["kind"] == "probe"]
        self._start_detector(found, self._probes)
        self._logs = [r for r in before if r["kind"] == "log"]

    def _keep_asked(self, model: nn.Module, options: WatchOptions) -> None:
        if self.history.path is None:  # nowhere to write, or another rank does
            return
        try:
            keep_asked(self.history.path.parent, self.prober, options, self.config, model)
        except (OSError, ValueError) as error:
            self.say(f"collapse: what is asked cannot be kept ({error}); `sft-plugins soften` will not know it.")

    def _start_detector(self, baseline: Probe | None, probes: Sequence[Probe]) -> None:
        self.detector = Detector(baseline, config=self.config)
        for probe in sorted(probes, key=lambda probe: probe.step):
            self.detector.add(probe)

    def _earlier(self) -> list[dict[str, Any]]:
        """What an interrupted run wrote up to the step this one resumes from."""
        path = self.history.path
        if self.start_step == 0 or path is None or not path.exists():
            return []
        try:
            return [r for r in read_history(path) if r.get("step", 0) <= self.start_step]
        except CollapseError as error:
            self.say(f"collapse: the earlier history cannot be read, so it starts anew: {error}")
            return []

    def _usable(self, folder: Path | None) -> Path | None:
        def check() -> Path | None:
            if folder is None:
                return None
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".{uuid.uuid4().hex}"
                probe.touch()
                probe.unlink()
            except OSError as error:
                self.say(
                    f"collapse: cannot write to {folder} ({error}); training goes on, but there will be no history, no "
                    "report and no baseline to resume with. Pass output_dir= a folder that can be written."
                )
                return None
            return folder

        return self.ranks.from_first(check)
