"""`pack_dataset` beside TRL's `pack_dataset`: the same rows, one process, in memory and from files.

    python tests/benchmarks/bench_packing.py [--n 20000] [--repeats 3] [--json FILE]

Documents have lognormal(6, .9) tokens clipped to [8, 4096], packed to 4096. Columns are `input_ids` and `labels`. Times
are the best of `--repeats` (caches off), after one call of each on a few rows; CPU seconds stand beside them, since wall
time says little on a busy machine. TRL plans 1,000 rows at a time by default;
its figure with all rows in one batch stands beside it. `pack_dataset` also checks every label; TRL does not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, disable_caching, disable_progress_bars, load_from_disk
from harness import Measured, script

from sft_plugins.packing.dataset import pack_dataset

CAPACITY = 4096


def documents(n: int, kind: str) -> Dataset:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 0.9, n), 8, CAPACITY).astype(np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    ids = np.random.default_rng(1).integers(5, 50_000, offsets[-1]).astype(kind)
    labels = ids.copy()
    labels[offsets[:-1]] = -100
    columns = {"input_ids": pa.ListArray.from_arrays(offsets, ids), "labels": pa.ListArray.from_arrays(offsets, labels)}
    return Dataset(pa.table(columns))


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    wall = cpu = float("inf")
    result = None
    for _ in range(repeats):
        del result  # as `run` builds another
        start, start_cpu = time.perf_counter(), time.process_time()
        result = run()
        wall, cpu = min(wall, time.perf_counter() - start), min(cpu, time.process_time() - start_cpu)
    return wall, cpu, result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=20_000, help="documents")
    parser.add_argument("--repeats", type=int, default=3)


def measure(options: argparse.Namespace) -> Measured:
    from trl.data_utils import pack_dataset as trl_pack_dataset

    disable_progress_bars()
    disable_caching()
    measured = Measured()

    def compare(kind: str, source: str, dataset: Dataset, file: str) -> None:
        tokens = sum(len(chunk.flatten()) for chunk in dataset.data.column("input_ids").chunks)
        bound = -(-tokens // CAPACITY)
        runs: dict[str, Callable[[], Any]] = {
            "TRL bfd": lambda: trl_pack_dataset(dataset, CAPACITY, "bfd"),
            "TRL bfd, one batch": lambda: trl_pack_dataset(dataset, CAPACITY, "bfd", {"batch_size": options.n}),
            "pack_dataset": lambda: pack_dataset(dataset, CAPACITY).dataset,
            "pack_dataset, to a file": lambda: pack_dataset(dataset, CAPACITY, cache_file=file).dataset,
        }
        first: tuple[float, float] | None = None
        for name, run in runs.items():
            seconds, cpu, packed = timed(run, options.repeats)
            first = first or (seconds, cpu)
            faster = {"faster": first[0] / seconds, "faster_cpu": first[1] / cpu}
            row = {"tokens": kind, "source": source, "packer": name, "seconds": seconds, "cpu_s": cpu, **faster}
            measured.records.append(row | {"rows": len(packed), "above_bound": len(packed) / bound - 1})

    with tempfile.TemporaryDirectory() as folder:
        for kind in ("int32", "int64"):
            dataset = documents(options.n, kind)
            pack_dataset(dataset.select(range(10)), CAPACITY)
            trl_pack_dataset(dataset.select(range(10)), CAPACITY, "bfd")
            compare(kind, "memory", dataset, str(Path(folder) / "packed.arrow"))
            dataset.save_to_disk(Path(folder) / kind)
            compare(kind, "files", load_from_disk(Path(folder) / kind), str(Path(folder) / "packed.arrow"))
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
