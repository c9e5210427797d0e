"""A run under watch from its first probe to its last: nothing it has seen is forgotten, and like is set against like."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_plugins._report import plain
from sft_plugins.collapse.callback import ModeCollapseCallback
from sft_plugins.collapse.detect.comparison import estimate
from sft_plugins.collapse.detect.detector import detect
from sft_plugins.collapse.detect.verdict import DetectorConfig, Probe
from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.metrics.entropy import TokenStatistics
from sft_plugins.collapse.metrics.per_prompt import measure
from sft_plugins.collapse.probe import figures
from sft_plugins.collapse.probe.figures import probe_from_record, to_probe
from sft_plugins.collapse.probe.probe import Look, Prober
from sft_plugins.collapse.probe.teacher_forcing import Judged
from testkit.collapse_runs import simulated_run
from testkit.watched_runs import OPTIONS, PROMPTS, byte_tokenizer, fake_embedder, tiny_model, train


@pytest.mark.slow
def test_the_best_held_out_loss_is_remembered_however_long_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss was best at step 2; 70 looks later the price without a return is still one."""
    steps = 72
    baseline, known = simulated_run([0.95, 0.95, 0.6], seed=1, heldout=[2.5, 2.0, 2.1])
    run = [dataclasses.replace(known[min(i, 2)], step=i + 1) for i in range(steps)]
    seen: list[Probe] = []

    def simulated(look: Look, base: Look | None, *, step: int) -> Probe:
        if step == 0:
            return baseline
        seen.append(run[step - 1])
        return seen[-1]

    def glance(self: Prober, model: Any, tier: int) -> Look:
        assert self.baseline is not None
        measures = self._measures(self.baseline.samples, self.baseline.embeddings)
        return Look(tier=2, held_out=None, frozen=None, measures=measures)

    monkeypatch.setattr(figures, "to_probe", simulated)
    monkeypatch.setattr(Prober, "look", glance)
    config = DetectorConfig(max_truncated=1.0, max_empty=1.0, resamples=200)
    options = {**OPTIONS, "embedder": fake_embedder, "max_new_tokens": 2, "every_steps": 1, "detector": config}
    watch = ModeCollapseCallback(byte_tokenizer(), PROMPTS, output_dir=tmp_path / "w", **options)
    train(tiny_model(), tmp_path / "a", callbacks=[watch], max_steps=steps)
    assert [p.step for p in seen] == list(range(1, steps + 1))
    assert watch.verdict is not None
    assert "tax_without_benefit" in watch.verdict.codes
    assert watch.verdict == detect(baseline, run, config=config)
    (found,) = [f for f in watch.verdict.findings if f.code == "tax_without_benefit"]
    assert "since step 2 " in found.evidence


def judged(entropy: torch.Tensor) -> Judged:
    """Ten pairs of ten tokens with these entropies."""
    row = torch.arange(10).repeat_interleave(10)
    stats = TokenStatistics(entropy, torch.ones_like(entropy), torch.ones_like(entropy))
    return Judged(stats, row, torch.arange(10).repeat(10))


def test_forks_lost_to_nan_are_left_out_on_both_sides() -> None:
    """A model that is exactly its baseline but for NaN logits at half of the forks keeps all of its fork entropy."""
    entropy = torch.rand(100, generator=torch.Generator().manual_seed(0))
    forks = torch.argsort(entropy, descending=True)[:20]
    broken = entropy.clone()
    broken[forks[::2]] = float("nan")
    base, now = (Look(tier=1, held_out=judged(e), frozen=None) for e in (entropy, broken))
    before, found = to_probe(base, base, step=0), to_probe(now, base, step=1)
    assert found.nonfinite == 10
    for probe in (found, probe_from_record(plain({"step": 1, **dataclasses.asdict(found)}))):
        kept = estimate(before, probe, config=DetectorConfig())["fork_retention"]
        assert (kept.value, kept.lo, kept.hi) == pytest.approx((1, 1, 1))
    assert figures.figures(now, base)["fork_retention"] == pytest.approx(1)


def test_the_first_eight_tokens_and_the_first_thirty_two_are_told_apart() -> None:
    """Two answers of 40 tokens whose entropy is the token's place."""
    entropy = torch.arange(40.0).repeat(2)
    stats = TokenStatistics(entropy, torch.ones_like(entropy), torch.ones_like(entropy))
    look = Look(
        tier=1, held_out=Judged(stats, torch.arange(2).repeat_interleave(40), torch.arange(40).repeat(2)), frozen=None
    )
    assert figures.by_position(look) == list(range(32))
    found = figures.figures(look, None)
    assert (found["entropy_first_8"], found["entropy_rest"]) == (sum(range(8)) / 8, sum(range(8, 40)) / 32)


def test_lengths_are_told_against_those_of_the_baseline() -> None:
    def answered(*texts: list[str]) -> Look:
        made = measure(texts, [[text.split() for text in group] for group in texts], tags=("open",) * len(texts))
        return Look(tier=2, held_out=None, frozen=None, measures=made)

    base, now = answered(["a b c", "d e f g h"], ["i j"]), answered(["a", "b c"], ["d"])
    assert figures.figures(base, None)["length"] == 3  # (4 + 2) / 2
    assert "length_ratio" not in figures.figures(base, None)
    assert figures.figures(now, base)["length_ratio"] == pytest.approx(1.25 / 3)
    silent = answered([""], [""])
    assert figures.figures(silent, base)["length_ratio"] == 0
    assert "length_ratio" not in figures.figures(now, silent)


@pytest.mark.slow
def test_fork_sums_of_the_history_give_the_interval_that_was_logged(tmp_path: Path) -> None:
    """`fork_entropy` and `fork_entropy_base` of a record are all it takes to draw the interval again."""
    watch = ModeCollapseCallback(
        byte_tokenizer(),
        PROMPTS,
        output_dir=tmp_path / "w",
        **{**OPTIONS, "embedder": fake_embedder, "max_new_tokens": 6, "every_steps": 2},
    )
    train(tiny_model(), tmp_path / "a", callbacks=[watch], max_steps=2)
    records = read_history(tmp_path / "w" / "history.jsonl")
    base, probe = (next(r for r in records if r["kind"] == kind) for kind in ("baseline", "probe"))
    again = estimate(probe_from_record(base), probe_from_record(probe), config=DetectorConfig())["fork_retention"]
    assert probe["intervals"]["fork_retention"] == pytest.approx([again.value, again.lo, again.hi])
    assert probe["fork_entropy_base"] == pytest.approx(base["fork_entropy"])
