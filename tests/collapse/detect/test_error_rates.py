"""How often the detector is wrong. The full table: `tests/benchmarks/bench_detector_power.py`."""

import pytest

from sft_plugins.collapse.detect.detector import detect
from sft_plugins.collapse.detect.verdict import LEVELS, DetectorConfig, Verdict
from testkit.collapse_runs import detect_each, simulated_run


def heard_at_least(verdict: Verdict, level: str) -> bool:
    return LEVELS.index(verdict.level) >= LEVELS.index(level)


@pytest.mark.slow
def test_false_alarms_are_rare_on_runs_that_lose_nothing() -> None:
    """Any finding at any of six probes counts; the baseline's luck is in all of them."""
    config = DetectorConfig(resamples=600)
    runs = [detect_each(*simulated_run([1.0] * 6, seed=seed), config=config) for seed in range(30)]
    alarms = sum(any(heard_at_least(verdict, "info") for verdict in run) for run in runs)
    assert alarms <= 4  # a detector that errs in 5 % of runs has five or more of 30 in 1.6 % of tries


@pytest.mark.slow
def test_a_fall_of_30_percent_is_found_by_the_second_probe() -> None:
    """16 prompts × 8 samples. 70 % retained lies above the band of `warn`: `info` is the right level, more is wrong."""
    runs = [detect(*simulated_run([0.7] * 2, seed=seed), config=DetectorConfig(resamples=600)) for seed in range(40)]
    assert sum(heard_at_least(verdict, "info") for verdict in runs) >= 32
    assert sum(heard_at_least(verdict, "warn") for verdict in runs) <= 2
