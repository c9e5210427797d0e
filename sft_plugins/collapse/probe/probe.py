"""One look at a model: tier 1 (it reads given answers) and tier 2 (it answers), now or as the baseline.

Knows models and tokenizers, no trainer and no clock. The caller holds `state.untouched` around every method that
takes a model. Everything that a rank computes goes through `Ranks.deal`, so the figures do not depend on how many
ranks there are.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from sft_plugins._preserve import adapter_off
from sft_plugins.collapse.detect.comparison import unusable
from sft_plugins.collapse.detect.verdict import DetectorConfig
from sft_plugins.collapse.distributed import Ranks
from sft_plugins.collapse.metrics.entropy import kl_from_cached
from sft_plugins.collapse.metrics.homogeneity import most_informative_length
from sft_plugins.collapse.metrics.per_prompt import Measures, measure
from sft_plugins.collapse.metrics.reasoning import reasoning_tokens
from sft_plugins.collapse.metrics.refusals import BOILERPLATE
from sft_plugins.collapse.probe.baseline import MIN_SAMPLES, Baseline, identity_of
from sft_plugins.collapse.probe.meaning import Meaning
from sft_plugins.collapse.probe.prompts import Prompt, encode_prompts
from sft_plugins.collapse.probe.ruler import Reading
from sft_plugins.collapse.probe.sampling import (
    Batch,
    Sample,
    generation_config,
    model_context,
    plan_batches,
    sample_batch,
    stop_token_ids,
)
from sft_plugins.collapse.probe.teacher_forcing import (
    Judged,
    LabelledText,
    adapter_effect,
    eval_rows,
    frozen_rows,
    judge_rows,
    plan_rows,
)
from sft_plugins.errors import CollapseError
from sft_plugins.masking import PromptMasker

__all__ = ["Look", "Prober"]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one probe found, before anything is judged."""

    tier: int
    held_out: Judged | None
    frozen: Judged | None
    samples: tuple[Sample, ...] = ()
    measures: Measures | None = None
    reading: Reading | None = None
    """How the ruler of meaning reads these answers; None without one."""
    out_of_range: str | None = None
    """Why it cannot read them; `measures` then holds nothing of meaning."""


class Prober:
    """Everything about probes that stays the same for a run.

    Args:
        model: only read here: its context length, its stop tokens.
        prompts, eval_pairs, samples_per_prompt, max_new_tokens, seed: as in `ModeCollapseCallback`.
        patterns: regular expressions of refusals and boilerplate.
        stop_ids: ids that stop generation, in place of those that the tokenizer and its template tell.
        show: whether a progress bar is shown.

    Raises:
        CollapseError: from `encode_prompts` and `eval_rows`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        *,
        eval_pairs: Any = None,
        max_eval_pairs: int = 64,
        samples_per_prompt: int = 8,
        max_new_tokens: int = 128,
        seed: int = 0,
        patterns: Sequence[str] = BOILERPLATE,
        stop_ids: Sequence[int] | None = None,
        ranks: Ranks | None = None,
        show: bool = False,
    ) -> None:
        self.tokenizer, self.prompts, self.k, self.seed = tokenizer, tuple(prompts), samples_per_prompt, seed
        self.ranks, self.show, self.patterns = ranks or Ranks(), show, tuple(patterns)
        self._config = model.config
        context = model_context(model.config)
        masker = PromptMasker(tokenizer, stop_token_ids=stop_ids)
        self.encoded = encode_prompts(self.prompts, masker, max_new_tokens=max_new_tokens, context=context)
        stops = stop_token_ids(masker, model)
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = stops[0] if stops else 0  # masked by position, and cut off after the first stop: any id will do
        self.generation = generation_config(max_new_tokens=max_new_tokens, stop_ids=stops, pad_id=pad)
        self.rows: tuple[LabelledText, ...] = ()
        if eval_pairs is not None:
            self.rows = eval_rows(eval_pairs, masker, context=context, limit=max_eval_pairs)
        self.max_rows: int | None = None
        self.autocast: torch.dtype | None = None
        self.meaning = Meaning(self.ranks, seed=seed)
        self.baseline: Baseline | None = None
        self.information_length: int | None = None

    @property
    def k_base(self) -> int:
        """Answers per prompt of the baseline."""
        return max(MIN_SAMPLES, self.k)

    def identity(self, model: nn.Module, *, base_only: bool) -> dict[str, str]:
        """What the baseline of this run would be of."""
        sampling = {
            "k": self.k_base,
            "max_new_tokens": self.generation.max_new_tokens,
            "stop": self.generation.eos_token_id,
            "seed": self.seed,
            "autocast": str(self.autocast),
        }
        return identity_of(
            model,
            self.tokenizer,
            encoded=self.encoded,
            sampling=sampling,
            held_out=self.rows,
            base_only=base_only,
        )

    def adapter_effect(self, model: nn.Module) -> float:
        """`teacher_forcing.adapter_effect` after the first prompt, in the precision that training computes in."""
        with self._precision(model):
            return adapter_effect(model, self.encoded[0])

    def surprise(self, model: nn.Module, baseline: Baseline) -> float:
        """How much less likely `model` finds what the model of `baseline` answered than that one did, nats per token."""
        with self._precision(model):
            now = self._judge(model, frozen_rows(baseline.samples, self.encoded))
        return kl_from_cached(-baseline.frozen.stats.nll, -now.stats.nll) or 0.0

    def take_baseline(self, model: nn.Module, *, kind: str, identity: dict[str, str]) -> Baseline:
        """Answers, vectors and token statistics of the model that training starts from."""
        began = time.perf_counter()
        with self._precision(model), adapter_off(model) if kind == "adapter_off" else nullcontext():
            samples = self._sample(model, self.k_base, "collapse: baseline answers")
            frozen = self._judge(model, frozen_rows(samples, self.encoded))
            held_out = self._judge(model, self.rows) if self.rows else None
        embeddings = self.meaning.embed([s.text for s in samples])
        baseline = Baseline(
            kind=kind,
            identity=identity,
            samples=samples,
            frozen=frozen,
            held_out=held_out,
            embeddings=embeddings,
            embedder=self.meaning.label,
            seconds=time.perf_counter() - began,
        )
        bad = frozen if held_out is None else Judged.join([frozen, held_out])
        if not bool(bad.stats.finite.all()):
            raise CollapseError(
                "the model's logits are NaN or infinite before the first step",
                code="nonfinite_logits",
                remedy="check the weights and the precision the model was loaded in",
            )
        return baseline

    def use_baseline(self, baseline: Baseline | None, detector: DetectorConfig) -> Look | None:
        """Measure every later probe against `baseline`; its own figures, or None without one."""
        self.baseline = baseline
        if baseline is None:
            return None
        baseline = self.baseline = self.meaning.settle(baseline)
        tokens = self._by_prompt(baseline.samples, lambda s: s.without_stop)
        opened = [group[: self.k] for group, p in zip(tokens, self.prompts, strict=True) if p.tag == "open"]
        self.information_length = most_informative_length(opened, seed=self.seed) if opened else None
        measures = self._measures(baseline.samples, None if self.meaning.out_of_range else baseline.embeddings)
        self.baseline = dataclasses.replace(baseline, problem=unusable(measures, config=detector))
        return Look(
            tier=2,
            held_out=baseline.held_out,
            frozen=baseline.frozen,
            samples=baseline.samples,
            measures=measures,
            reading=self.meaning.reading,
            out_of_range=self.meaning.out_of_range,
        )

    def look(self, model: nn.Module, tier: int) -> Look:
        """Tier 1, and with `tier=2` tier 2 as well."""
        with self._precision(model):
            against = self.baseline is not None and self.baseline.kind == "adapter_off"
            held_out = self._judge(model, self.rows, against_base=against) if self.rows else None
            frozen = None
            if self.baseline is not None:
                frozen = self._judge(model, frozen_rows(self.baseline.samples, self.encoded), against_base=against)
            if tier < 2:
                return Look(tier=1, held_out=held_out, frozen=frozen)
            samples = self._sample(model, self.k, "collapse: answers")
        reading, why = self.meaning.in_range([s.text for s in samples])
        measures = self._measures(samples, None if why else self.meaning.embed([s.text for s in samples]))
        return Look(
            tier=2,
            held_out=held_out,
            frozen=frozen,
            samples=samples,
            measures=measures,
            reading=reading,
            out_of_range=why,
        )

    def by_prompt(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """The answers to each prompt, in order."""
        return self._by_prompt(samples, lambda sample: sample)

    def _by_prompt(self, samples: Sequence[Sample], of: Any) -> list[list[Any]]:
        groups: list[list[Any]] = [[] for _ in self.prompts]
        for sample in samples:
            groups[sample.prompt].append(of(sample))
        return groups

    def _precision(self, model: nn.Module) -> Any:
        """The precision training computes in; the trainer's own autocast does not reach callbacks."""
        device = next(model.parameters()).device
        return nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)

    def shrink(self) -> None:
        """Answer half as many rows at once from now on. Other batches have other seeds, so the answers change, too."""
        widest = max(len(batch.rows) for batch in self._batches(self.k))
        self.max_rows = max(1, widest // 2)

    def _sample(self, model: nn.Module, k: int, title: str) -> tuple[Sample, ...]:
        batches = self._batches(k)
        device = next(model.parameters()).device
        with tqdm(total=len(batches), desc=title, leave=False, disable=not self.show) as bar:
            answered = self.ranks.deal(
                batches,
                lambda batch: sample_batch(
                    model, batch, self.encoded, self.tokenizer, config=self.generation, device=device
                ),
                progress=bar.update,
            )
        return tuple(sorted((s for batch in answered for s in batch), key=lambda s: (s.prompt, s.index)))

    def _batches(self, k: int) -> list[Batch]:
        return plan_batches(
            self.encoded,
            k,
            max_new_tokens=int(self.generation.max_new_tokens or 1),
            config=self._config,
            seed=self.seed,
            max_rows=self.max_rows,
        )

    def _judge(self, model: nn.Module, rows: Sequence[LabelledText], *, against_base: bool = False) -> Judged:
        batches = plan_rows(rows)
        judged = Judged.join(
            self.ranks.deal(batches, lambda batch: judge_rows(model, rows, batch, against_base=against_base))
        )
        order = torch.argsort(judged.row, stable=True)
        stats = dataclasses.replace(
            judged.stats, **{k: v[order] for k, v in vars(judged.stats).items() if v is not None}
        )
        return Judged(stats, judged.row[order], judged.offset[order])

    def _measures(self, samples: Sequence[Sample], embeddings: np.ndarray | None) -> Measures:
        groups: list[np.ndarray] | None = None
        if embeddings is not None:
            centre = self.meaning.centre(embeddings if self.baseline is None else self.baseline.embeddings)
            if centre is not None:
                embeddings = embeddings - centre
            owner = np.array([s.prompt for s in samples])
            groups = [embeddings[owner == p.id] for p in self.prompts]
        return measure(
            self._by_prompt(samples, lambda s: s.text),
            self._by_prompt(samples, lambda s: s.without_stop),
            tags=[p.tag for p in self.prompts],
            embeddings=groups,
            truncated=self._by_prompt(samples, lambda s: s.truncated),
            reasoning=self._by_prompt(
                samples, lambda s: reasoning_tokens(self.tokenizer, self.encoded[s.prompt], s.token_ids)
            ),
            equal_k=self.k,
            information_length=self.information_length,
            patterns=self.patterns,
            seed=self.seed,
        )
