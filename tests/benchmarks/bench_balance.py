"""How long ranks wait for one another, by the cost model: packed rows shuffled, and dealt by `deal_rows`; 8 to 512 ranks.

    python tests/benchmarks/bench_balance.py --ranks 8 64 512

Lengths are real conversations (`chitchat-dataset` under ChatML, drawn with replacement) or lognormal(6, .9), cut at the
row's size, packed by `plan_packs`. Costs are those of attention alone, and of a 1B model (Llama 3.2's shape) with its
projections and its LM head. No timing: every figure is exact arithmetic on lengths.
"""

from __future__ import annotations

import argparse

import numpy as np
import pyarrow as pa
from datasets import Dataset
from harness import Measured, script
from material import conversation_lengths

from sft_plugins.packing import RowCost, deal_rows, plan_packs

COSTS = {
    "attention alone": RowCost(),
    # 2 · weights of the linear layers and the head, 2 · layers · heads · head size
    "1B model": RowCost(linear=2.0 * (973_078_528 + 128_256 * 2048), quadratic=2.0 * 16 * 32 * 64),
}


def packed_lengths(distribution: str, capacity: int, documents: int) -> Dataset:
    """Rows of `seq_lengths` alone."""
    rng = np.random.default_rng(0)
    lengths = (
        rng.lognormal(6, 0.9, documents)
        if distribution == "lognormal"
        else rng.choice(conversation_lengths(), documents)
    )
    lengths = np.clip(lengths, 8, capacity).astype(np.int32)
    plan = plan_packs(lengths, capacity, seed=0)
    return Dataset(
        pa.table({"seq_lengths": pa.ListArray.from_arrays(plan.offsets.astype(np.int32), lengths[plan.indices])})
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--capacity", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--documents", type=int, default=2_000_000)


def measure(options: argparse.Namespace) -> Measured:
    measured = Measured()
    for distribution in ("real", "lognormal"):
        for capacity in options.capacity:
            try:
                packed = packed_lengths(distribution, capacity, options.documents)
            except ImportError as error:
                measured.skipped["real conversations"] = str(error)
                break
            for name, cost in COSTS.items():
                for ranks in options.ranks:
                    for accumulation in options.accumulation:
                        report = deal_rows(packed, ranks=ranks, accumulation=accumulation, cost=cost).report
                        measured.records.append(
                            {
                                "lengths": distribution,
                                "capacity": capacity,
                                "cost": name,
                                "ranks": ranks,
                                "accumulation": accumulation,
                                "rows": report.rows,
                                "idle_shuffled": report.idle_shuffled,
                                "idle_dealt": report.idle_dealt,
                                "speedup": report.speedup,
                                "spread_shuffled": report.spread_shuffled,
                                "spread_dealt": report.spread_dealt,
                            }
                        )
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
