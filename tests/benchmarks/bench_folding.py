"""What `share_prefixes` costs: folding, planning and packing to a file, of rows that share much and of rows that share nothing.

    python tests/benchmarks/bench_folding.py [--n 1000000] [--repeats 3] [--json FILE]

Rows as a template makes them that rewrites history: ten turns, ten rows, and row k holds the questions and answers before it,
question k, two tokens of thought that no later row has, answer k; 140 tokens on average. Rows that share nothing are as long,
and have but their first four tokens in common. Each way runs in a process of its own, from mapped files; CPU seconds are the
least of `--repeats` after a small run that compiles, memory is what no file backs (Linux).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, disable_caching, disable_progress_bars, load_from_disk
from harness import Measured, alone, cpu_seconds, script
from memory import AnonymousMemory

from sft_plugins.packing import pack_dataset, plan_packs
from sft_plugins.packing.arrow import TokenColumn
from sft_plugins.packing.prefix_tree.fold import fold
from sft_plugins.packing.prefix_tree.rows import ranges

CAPACITY = 4096
TURNS = 10
THOUGHT = 2
OPENING = 4
DATA = ("ten turns", "nothing shared", "nothing shared, one row of 12 tokens")
PIECE = 100_000


def some_rows(data: str, count: int, seed: int) -> pa.Table:
    """`count` rows, a multiple of ten."""
    rng = np.random.default_rng(seed)
    parts = rng.integers(8, 18, (count // TURNS, 2 * TURNS))  # question, answer, question …
    ends = np.cumsum(parts, axis=1)
    asked, length = ends[:, ::2].ravel(), ends[:, 1::2].ravel() + THOUGHT
    if data.endswith("12 tokens") and seed == 0:
        asked[0], length[0] = 6, 12
    before = np.cumsum(length) - length
    position = ranges(np.zeros(count, np.int64), length)
    behind = position - np.repeat(asked, length)  # the question, from which on the row trains
    if data == "ten turns":
        texts = rng.integers(10, 50_000, ends[:, -1].sum(), dtype=np.int32)
        begins = np.cumsum(ends[:, -1]) - ends[:, -1]
        told = np.repeat(np.repeat(begins, TURNS), length) + position - np.where(behind >= THOUGHT, THOUGHT, 0)
        ids = np.where(
            (behind >= 0) & (behind < THOUGHT), np.int32(9) - behind, texts[np.minimum(told, len(texts) - 1)]
        )
    else:
        ids = np.where(position < OPENING, position, rng.integers(10, 50_000, len(position)))
    labels = np.where(behind >= 0, ids, -100)
    offsets = np.append(before, len(position)).astype(np.int32)
    columns = {"input_ids": ids, "labels": labels}
    return pa.table(
        {name: pa.ListArray.from_arrays(offsets, values.astype(np.int32)) for name, values in columns.items()}
    )


def write(data: str, n: int, folder: str) -> None:
    counts = [min(PIECE, n - at) for at in range(0, n, PIECE)]
    table = pa.concat_tables([some_rows(data, count, seed) for seed, count in enumerate(counts)])
    Dataset(table).save_to_disk(folder)


def least(run: Callable[[], Any], repeats: int) -> tuple[float, float, float, Any]:
    """CPU seconds and wall seconds, the least of each; the most memory (MiB); what the last run gave."""
    cpu, wall, mib, result = [], [], [], None
    for _ in range(repeats):
        del result  # as `run` makes another
        with AnonymousMemory() as memory:
            start, start_cpu = time.perf_counter(), cpu_seconds()
            result = run()
            cpu.append(cpu_seconds() - start_cpu)
            wall.append(time.perf_counter() - start)
        mib.append(memory.mib)
    return min(cpu), min(wall), max(mib), result


def one_way(folder: str, data: str, share: bool, repeats: int) -> dict[str, Any]:
    disable_progress_bars()
    disable_caching()
    rows = load_from_disk(folder)
    few = rows.select(range(min(len(rows), 1000)))
    pack_dataset(few, CAPACITY, share_prefixes=share)
    ids, labels = (TokenColumn.of(rows, name) for name in ("input_ids", "labels"))

    def plan() -> Any:
        return plan_packs(fold(ids, labels, ids.length, CAPACITY).tokens if share else ids.length, CAPACITY, seed=0)

    plan_cpu, plan_wall, plan_mib, _ = least(plan, repeats)
    with tempfile.TemporaryDirectory() as out:
        cpu, wall, mib, packed = least(
            lambda: pack_dataset(rows, CAPACITY, share_prefixes=share, cache_file=f"{out}/packed.arrow"), repeats
        )
        packed_rows, tokens = packed.report.rows, packed.report.tokens
        del packed
    return {
        "data": data,
        "n": len(rows),
        "share_prefixes": share,
        "tokens_in": int(ids.length.sum()),
        "tokens": tokens,
        "rows": packed_rows,
        "plan_s": plan_cpu,
        "plan_wall_s": plan_wall,
        "plan_mib": plan_mib,
        "pack_s": cpu,
        "pack_wall_s": wall,
        "pack_mib": mib,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=1_000_000, help=f"rows, a multiple of {TURNS}")
    parser.add_argument("--repeats", type=int, default=3)


def measure(options: argparse.Namespace) -> Measured:
    measured = Measured()
    for data in DATA:
        with tempfile.TemporaryDirectory() as folder:
            alone(write, data, options.n, folder)
            measured.records += [alone(one_way, folder, data, share, options.repeats) for share in (False, True)]
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
