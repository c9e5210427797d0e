"""What is compared, under whose options, and where a baseline stops being one: both sides of each limit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sft_plugins.collapse.detect.comparison import estimate, unusable
from sft_plugins.collapse.detect.detector import Detector
from sft_plugins.collapse.detect.verdict import DetectorConfig, Probe, Verdict
from sft_plugins.collapse.metrics.per_prompt import Measures, measure
from testkit.collapse_runs import simulated_run

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron"]


def measured(seed: int) -> Measures:
    """Answers to 8 open prompts that differ in all that is measured, and 8 closed ones."""
    rng = np.random.default_rng(seed)
    texts = [[" ".join(rng.choice(WORDS[: 2 + p % 6], size=6)) for _ in range(6)] for p in range(16)]
    tokens = [[text.split() for text in group] for group in texts]
    tags = ["open"] * 8 + ["closed"] * 8
    return measure(texts, tokens, tags=tags, embeddings=list(rng.normal(size=(16, 6, 5))), opening_length=2)


def two_looks() -> tuple[Probe, Probe]:
    first, second = (
        Probe(step=seed, measures=measured(seed), fork_entropy=np.random.default_rng(seed).uniform(1, 2, 9))
        for seed in (0, 1)
    )
    return first, second


@pytest.mark.parametrize("change", [{"seed": 1}, {"confidence": 0.8}, {"resamples": 200}])
def test_every_figure_is_resampled_as_the_configuration_says(change: dict[str, Any]) -> None:
    base, now = two_looks()
    usual = estimate(base, now, config=DetectorConfig())
    other = estimate(base, now, config=DetectorConfig(**change))
    assert {"diversity_retained", "closed_diversity_retained", "specificity_change", "similarity_rise"} <= set(usual)
    for name, found in usual.items():
        if found.lo < found.hi:
            assert (found.lo, found.hi) != (other[name].lo, other[name].hi), name
        assert found.value == other[name].value, name


@pytest.mark.parametrize("name", ["repetition", "truncated", "empty"])
def test_a_baseline_at_the_limit_serves_and_one_beyond_does_not(name: str) -> None:
    texts = [["a b c d a b c d a b c d", ""], ["one two three four five", ""]] * 3
    tokens = [[text.split() for text in group] for group in texts]
    cut = [[True, False]] * 6
    found = measure(texts, tokens, tags=["open"] * 6, truncated=cut)
    share = found.mean(name)
    assert share is not None
    assert 0 < share < 1
    wide = {"max_repetition": 1.0, "max_truncated": 1.0, "max_empty": 1.0}
    assert unusable(found, config=DetectorConfig(**{**wide, f"max_{name}": share})) is None
    reason = unusable(found, config=DetectorConfig(**{**wide, f"max_{name}": float(np.nextafter(share, 0))}))
    assert reason is not None
    assert reason.startswith(f"{share:.0%}")


def heard(retained: list[float]) -> list[Verdict]:
    baseline, probes = simulated_run(retained, seed=0, scatter=0.0)
    detector = Detector(baseline)
    return [detector.add(probe) for probe in probes]


def advice(verdict: Verdict) -> str:
    (found,) = (finding for finding in verdict.findings if finding.code == "narrowing")
    return found.suggestion


def test_the_last_healthy_look_is_named_where_there_was_one() -> None:
    verdict = heard([1.0, 0.2, 0.2])[-1]
    assert verdict.level in ("warn", "critical")
    assert "Last healthy probe: step 10." in advice(verdict)


def test_no_healthy_look_is_named_where_there_was_none_or_none_is_needed() -> None:
    never = heard([0.2, 0.2])[-1]
    assert never.level in ("warn", "critical")
    assert "Last healthy probe" not in advice(never)
    mild = heard([0.7, 0.7, 0.7])[-1]
    assert mild.level == "info"
    assert "Last healthy probe" not in advice(mild)


def test_a_verdict_keeps_the_step_of_the_last_healthy_look() -> None:
    steps = [verdict.healthy_step for verdict in heard([1.0, 1.0, 0.2, 0.2])]
    assert steps == [10, 20, 20, 20]
    assert {field.name for field in dataclasses.fields(Verdict)} >= {"healthy_step"}
