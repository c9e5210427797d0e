"""How often the collapse detector is wrong, and how small a fall it sees: `python tests/benchmarks/bench_detector_power.py`.

Models of known variety (`testkit.answer_worlds`) answer P prompts with K samples each; the baseline has 16 samples, drawn
once, so its luck is in every probe, as in a real run. A true fall is one of all prompts that could have been asked; those
that are asked change unequally (± 20 %), so which prompts were asked is luck too. A run has eight probes; the verdict is
heard after each.

What the words mean here:

- *False alarm*: any finding of level `info` or more, at any of the eight probes, on a run whose diversity is exactly what
  it was. The target is 5 % of runs. `info` is the most sensitive level; `warn` and `critical` are counted apart, also at
  the very edge of their bands (a true 62 % and 38 %), where an error is likeliest.
- *Power*: share of runs in which a true fall is found by the second probe that sees it, the earliest that persistence
  allows. For a fall of 30 % (70 % retained) the right finding is `info`: 70 % lies above the band of `warn`, which is for a
  fall beyond what ordinary fine-tuning costs. So `warn` at a true 70 % is counted as an error and power at that level as
  `narrowing` of any level. `warn` and `critical` have power of their own, at falls that deserve them.

How noisy these models are: with K = 8 the estimated diversity of one prompt varies by 11 % (standard deviation / mean) at
the baseline and by 28 % after a fall to 70 %, since a fall here means that fewer answers take more of the odds. Measured
on SmolLM2-135M-Instruct with all-MiniLM-L6-v2, temperature 1, 40 tokens: 5 to 14 % on four open prompts. A model that
gives one answer 40–65 % of the time already before training varies by 30 %, then 48 %: there the power at a fall of 30 %
with 16 × 8 was only 17 of 40 runs at the second probe: such prompts belong among the `closed` ones.

Found with 200 runs each (`--runs 200`, minutes; by default 40; 16 prompts × 8 samples):

| truly retained | at the second probe: info+ | warn+ | critical | ever in eight probes: info+ | warn+ | critical |
| --- | --- | --- | --- | --- | --- | --- |
| 100 % | 0.5 % | 0 | 0 | 0.5 % | 0 | 0 |
| 70 % | 98.0 % | 0 | 0 | 100 % | 0 | 0 |
| 62 % | 100 % | 0 | 0 | 100 % | 0 | 0 |
| 50 % | 100 % | 20.5 % | 0 | 100 % | 69.5 % | 0 |
| 38 % | 100 % | 90.5 % | 0 | 100 % | 100 % | 0 |
| 20 % | 100 % | 100 % | 72.0 % | 100 % | 100 % | 99.0 % |
| 5 % | 100 % | 100 % | 100 % | 100 % | 100 % | 100 % |

So with 16 prompts a level is certain only well below its band, and never fired at the band's very edge.

Other sizes, 200 runs each, the same columns:

| prompts × samples | truly retained | info+ | warn+ | critical | ever: info+ | warn+ | critical |
| --- | --- | --- | --- | --- | --- | --- | --- |
| 32 × 8 | 100 % | 0 | 0 | 0 | 1.5 % | 0 | 0 |
| 32 × 8 | 93 % | 12.0 % | 0 | 0 | 36.0 % | 0 | 0 |
| 32 × 8 | 84 % | 92.5 % | 0 | 0 | 99.5 % | 0 | 0 |
| 32 × 8 | 50 % | 100 % | 59.5 % | 0 | 100 % | 95.5 % | 0 |
| 32 × 8 | 20 % | 100 % | 100 % | 97.5 % | 100 % | 100 % | 100 % |
| 8 × 8 | 100 % | 0 | 0 | 0 | 0.5 % | 0 | 0 |
| 8 × 8 | 70 % | 43.5 % | 0 | 0 | 83.0 % | 0 | 0 |
| 16 × 4 | 100 % | 0 | 0 | 0 | 0 | 0 | 0 |
| 16 × 4 | 70 % | 62.0 % | 0 | 0 | 96.0 % | 0 | 0 |

`homogeneity` fired in none of these runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from harness import Measured, plain_table, script

from sft_plugins.collapse.detect.verdict import LEVELS, Verdict
from testkit.collapse_runs import detect_each, simulated_run

SETTINGS = (  # truly retained, prompts, samples per prompt
    *((retained, 16, 8) for retained in (1.0, 0.7, 0.62, 0.5, 0.38, 0.2, 0.05)),
    *((retained, 32, 8) for retained in (1.0, 0.93, 0.84, 0.5, 0.2)),
    *((retained, 8, 8) for retained in (1.0, 0.7)),
    *((retained, 16, 4) for retained in (1.0, 0.7)),
)
RATES = ("second_info", "second_warn", "second_critical", "ever_info", "ever_warn", "ever_critical", "homogeneity")


def at_least(verdict: Verdict, level: str) -> bool:
    return LEVELS.index(verdict.level) >= LEVELS.index(level)


def rates(retained: float, *, runs: int, prompts: int, k: int, probes: int = 8) -> list[float]:
    """Shares of runs: at the second probe and ever, at least info, warn, critical; and homogeneity ever."""
    heard: list[Sequence[Verdict]] = []
    for seed in range(runs):
        heard.append(detect_each(*simulated_run([retained] * probes, seed=seed, prompts=prompts, k=k)))
    levels = LEVELS[1:]
    second = [sum(at_least(run[1], level) for run in heard) / runs for level in levels]
    ever = [sum(any(at_least(v, level) for v in run) for run in heard) / runs for level in levels]
    return [*second, *ever, sum(any("homogeneity" in v.codes for v in run) for run in heard) / runs]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=40)


def measure(options: argparse.Namespace) -> Measured:
    """Shares of runs per setting; ends the process where a target is missed."""
    measured = Measured()
    for retained, prompts, k in SETTINGS:
        found = dict(zip(RATES, rates(retained, runs=options.runs, prompts=prompts, k=k), strict=True))
        measured.records.append({"retained": retained, "prompts": prompts, "samples": k, "runs": options.runs, **found})
    healthy, fallen = measured.records[:2]
    if healthy["ever_info"] > 0.05 or fallen["second_info"] < 0.8:
        print(plain_table(measured.records))
        sys.exit("target missed: false alarms in at most 5 % of runs, power of 80 % at a fall of 30 %")
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
