"""Ten thousand forwards of an isolated model, drawn at random: `python tests/benchmarks/bench_forward_inputs.py`.

Documents, padding, positions, masks and keys, each left out, said as meant, or spoiled in one place. A forward that runs must
be exact for all that it was told, one that nobody spoiled may not be refused (`testkit.forward_inputs`). Counts of each
outcome, the largest difference of a document from itself alone, and `faults`, which must be 0.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter

from harness import Measured, cpu_seconds, script
from hypothesis import HealthCheck, Phase, given, settings

from sft_plugins.packing import isolate
from testkit.forward_inputs import Case, cases, fault, outcome
from testkit.tiny_models import build

OTHERS = ("gpt2", "opt", "bloom", "gemma2", "mamba2")
"""Learned positions, positions counted from the mask, biases of distance, windows, a state: a tenth of the forwards each."""

Kind = tuple[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--examples", type=int, default=10_000)


def measure(options: argparse.Namespace) -> Measured:
    """A record per model and outcome, of cases as meant and of spoiled ones."""
    measured = Measured()
    started, forwards, faults = cpu_seconds(), 0, []
    for architecture in ("llama", *OTHERS):
        examples = options.examples if architecture == "llama" else options.examples // 10
        counts, worst, wrong = _draw(architecture, examples)
        forwards += sum(counts.values())
        faults += wrong
        for (said, what), count in sorted(counts.items()):
            record = {"model": architecture, "said": said, "outcome": what, "forwards": count}
            measured.records.append(record | {"largest_difference": float(worst[said, what])})
    measured.skipped |= {f"fault {i}": text for i, text in enumerate(faults[:20])}
    everything = {"said": "all", "outcome": "faults", "forwards": forwards, "faults": len(faults)}
    measured.records.append(everything | {"cpu_seconds": cpu_seconds() - started})
    return measured


def _draw(architecture: str, examples: int) -> tuple[Counter[Kind], Counter[Kind], list[str]]:
    """How many cases had each outcome, the largest difference among them, and the faults."""
    plain = build(architecture, **({"num_hidden_layers": 1} if architecture == "llama" else {})).model
    isolated = copy.deepcopy(plain)
    isolate(isolated)
    counts: Counter[Kind] = Counter()
    worst: Counter[Kind] = Counter()
    faults: list[str] = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def draw(case: Case) -> None:
        what, difference = outcome(isolated, plain, case)
        kind = ("spoiled" if case.spoiled else "as meant", what)
        counts[kind] += 1
        worst[kind] = max(worst[kind], difference)
        if (wrong := fault(case, what, difference)) is not None:
            faults.append(f"{architecture}: {wrong}: {case}")

    draw()
    return counts, worst, faults


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
