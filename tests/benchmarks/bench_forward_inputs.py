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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--examples", type=int, default=10_000)


def measure(options: argparse.Namespace) -> Measured:
    """A record per outcome of cases as meant and of spoiled ones."""
    plain = build("llama", num_hidden_layers=1).model
    isolated = copy.deepcopy(plain)
    isolate(isolated)
    counts: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    worst: Counter[tuple[str, str]] = Counter()

    @settings(
        max_examples=options.examples,
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
            faults.append(f"{wrong}: {case}")

    started = cpu_seconds()
    draw()
    seconds = cpu_seconds() - started
    measured = Measured(skipped={f"fault {i}": text for i, text in enumerate(faults[:20])})
    for (said, what), count in sorted(counts.items()):
        measured.records.append(
            {"said": said, "outcome": what, "forwards": count, "largest_difference": float(worst[said, what])}
        )
    measured.records.append(
        {
            "said": "all",
            "outcome": "faults",
            "forwards": sum(counts.values()),
            "faults": len(faults),
            "cpu_seconds": seconds,
        }
    )
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
