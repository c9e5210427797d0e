"""How often the 95 % interval of retained diversity holds the truth: `python tests/benchmarks/bench_interval_coverage.py`.

The worlds are those of `bench_detector_power.py`: P prompts are drawn from all that could have been asked, each narrows by a
factor of its own around the true share (± 20 %), the baseline has 16 answers to each and the probe 8. The truth is the share
of diversity kept over all prompts that could have been asked. An interval that says 95 % should hold it in 95 of 100 runs.
"""

from __future__ import annotations

import argparse

from harness import Measured, script

from sft_plugins.collapse.detect.comparison import estimate
from sft_plugins.collapse.detect.verdict import DetectorConfig
from testkit.collapse_runs import simulated_run

PROMPTS = (4, 8, 16, 32)
RETAINED = (1.0, 0.7, 0.4)


def coverage(retained: float, *, prompts: int, runs: int, k: int = 8) -> tuple[float, float]:
    """Share of runs whose interval holds `retained`, and the mean width of the interval."""
    held, width = 0, 0.0
    for seed in range(runs):
        baseline, (probe,) = simulated_run([retained], seed=seed, prompts=prompts, k=k)
        found = estimate(baseline, probe, config=DetectorConfig())["diversity_retained"]
        held += found.lo <= retained <= found.hi
        width += found.hi - found.lo
    return held / runs, width / runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=100)


def measure(options: argparse.Namespace) -> Measured:
    """A record per number of prompts and true share."""
    measured = Measured()
    for prompts in PROMPTS:
        for retained in RETAINED:
            held, width = coverage(retained, prompts=prompts, runs=options.runs)
            measured.records.append(
                {"prompts": prompts, "retained": retained, "runs": options.runs, "coverage": held, "width": width}
            )
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
