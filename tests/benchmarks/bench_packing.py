"""`pack_dataset` beside TRL's `pack_dataset`: the same rows, one process, in memory and from files.

    python tests/benchmarks/bench_packing.py [--n 20000] [--repeats 3] [--json FILE]

Documents have lognormal(6, .9) tokens clipped to [8, 4096], packed to 4096. Columns are `input_ids` and `labels`. Times
are the best of `--repeats` (caches off), after one call of each on a few rows; CPU seconds stand beside them, since wall
time says little on a busy machine. TRL plans 1,000 rows at a time by default;
its figure with all rows in one batch stands beside it. `pack_dataset` also checks every label; TRL does not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, disable_caching, disable_progress_bars, load_from_disk
from rich.console import Console
from rich.table import Table

from sft_plugins.packing.dataset import pack_dataset
from sft_plugins.packing.stream import pack_stream

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20_000, help="documents")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the figures here too")
    options = parser.parse_args()
    from trl.data_utils import pack_dataset as trl_pack_dataset

    disable_progress_bars()
    disable_caching()
    console = Console()
    table = Table(title=f"{options.n:,} documents to rows of {CAPACITY:,}")
    for heading in ("tokens", "source", "packer", "seconds", "× TRL", "CPU", "× TRL", "rows", "above bound"):
        table.add_column(heading, justify="left" if heading in ("tokens", "source", "packer") else "right")
    figures: list[dict[str, Any]] = []

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
            faster, faster_cpu = first[0] / seconds, first[1] / cpu
            above = (len(packed) - bound) / bound
            row = {"tokens": kind, "source": source, "packer": name, "seconds": seconds, "rows": len(packed)}
            figures.append(row | {"cpu": cpu, "faster": faster, "faster_cpu": faster_cpu, "above_bound": above})
            speed = (f"{seconds:.3f}", f"{faster:.1f}", f"{cpu:.3f}", f"{faster_cpu:.1f}")
            table.add_row(kind, source, name, *speed, f"{len(packed):,}", f"{above:.3%}")

    with tempfile.TemporaryDirectory() as folder:
        for kind in ("int32", "int64"):
            dataset = documents(options.n, kind)
            pack_dataset(dataset.select(range(10)), CAPACITY)
            trl_pack_dataset(dataset.select(range(10)), CAPACITY, "bfd")
            compare(kind, "memory", dataset, str(Path(folder) / "packed.arrow"))
            dataset.save_to_disk(Path(folder) / kind)
            compare(kind, "files", load_from_disk(Path(folder) / kind), str(Path(folder) / "packed.arrow"))

    stream = pack_stream(documents(options.n, "int32").with_format("numpy"), CAPACITY)
    start = time.perf_counter()
    rows = sum(1 for _ in stream)
    seconds, report = time.perf_counter() - start, stream.report
    above = report.rows_above_bound / report.lower_bound
    figures.append({"packer": "pack_stream", "seconds": seconds, "rows": rows, "above_bound": above})
    table.add_row("int32", "rows", "pack_stream", f"{seconds:.3f}", "", "", "", f"{rows:,}", f"{above:.3%}")
    console.print(table)
    if options.json:
        with open(options.json, "w") as out:
            json.dump({"n": options.n, "rows": figures}, out, indent=2)


if __name__ == "__main__":
    main()
