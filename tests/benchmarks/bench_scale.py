"""Single costs that `docs/scale.md` carries to a billion documents: planning, packing, dealing, reading, with memory.

    python tests/benchmarks/bench_scale.py                        about two minutes on two cores, 3 GiB
    python tests/benchmarks/bench_scale.py --plan 1000000000      a billion lengths: some minutes, 17 GiB and more

What is measured for its memory runs in a process of its own, whose highest resident set is compared with that after its
input exists (Linux). Lengths are lognormal(6, .9) clipped to [8, 4096], capacity 4096.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate.data_loader import BatchSamplerShard
from bench_packing import documents
from datasets import Dataset, disable_progress_bars, load_from_disk
from harness import Measured, alone, script
from memory import AnonymousMemory, PeakMemory
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from sft_plugins.packing import deal_rows, pack_dataset, pack_stream, plan_packs

CAPACITY = 4096
SAMPLERS = {"in sequence": SequentialSampler, "at random": RandomSampler}


def lengths_of(n: int) -> np.ndarray:
    """int32, drawn 10 M at a time: the doubles of 100 M at once would be the highest memory of all."""
    rng = np.random.default_rng(0)
    parts = [
        np.clip(rng.lognormal(6, 0.9, min(10**7, n - at)), 8, CAPACITY).astype(np.int32) for at in range(0, n, 10**7)
    ]
    return np.concatenate(parts)


def planning(n: int, seed: int | None) -> dict[str, Any]:
    plan_packs([1, 2], CAPACITY, seed=0)
    lengths = lengths_of(n)
    with PeakMemory() as peak:
        start = time.perf_counter()
        plan = plan_packs(lengths, CAPACITY, seed=seed)
        seconds = time.perf_counter() - start
    return {
        "what": "plan" if seed is None else "plan, seeded",
        "n": n,
        "seconds": seconds,
        "mib": peak.mib,
        "rows": len(plan),
        "above_bound": len(plan) / plan.lower_bound - 1,
    }


def dealing(rows: int, ranks: int) -> dict[str, Any]:
    """Rows of `seq_lengths` alone: dealing reads nothing else."""
    plan = plan_packs(lengths_of(rows * 7), CAPACITY, seed=0)
    lists = pa.ListArray.from_arrays(plan.offsets.astype(np.int32), lengths_of(rows * 7)[plan.indices])
    packed = Dataset(pa.table({"seq_lengths": lists}))
    deal_rows(packed.select(range(ranks)), ranks=ranks)
    with PeakMemory() as peak:
        start = time.perf_counter()
        deal_rows(packed, ranks=ranks)
        seconds = time.perf_counter() - start
    return {"what": "deal", "n": len(packed), "seconds": seconds, "mib": peak.mib}


def streaming(n: int, buffer_size: int) -> dict[str, Any]:
    stream = pack_stream(documents(n, "int32").with_format("numpy"), CAPACITY, buffer_size=buffer_size)
    start = time.perf_counter()
    rows = sum(1 for _ in stream)
    seconds = time.perf_counter() - start
    above = stream.report.rows_above_bound / stream.report.lower_bound
    return {"what": f"stream, buffer {buffer_size:,}", "n": n, "seconds": seconds, "rows": rows, "above_bound": above}


def reading(n: int) -> list[dict[str, Any]]:
    """Packed rows out of a memory-mapped file, as a dataloader takes them, in file order and as dealt (a selection)."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        packed = pack_dataset(documents(n, "int32"), CAPACITY, cache_file=f"{folder}/packed.arrow").dataset
        dealt = deal_rows(packed, ranks=8).dataset
        for what, rows in (("read a row in file order", packed), ("read a row as dealt", dealt)):
            rows = rows.with_format("numpy")
            start = time.perf_counter()
            for i in range(len(rows)):
                rows[i]
            records.append({"what": what, "n": len(rows), "seconds": time.perf_counter() - start})
    return records


def packing(n: int) -> dict[str, Any]:
    """Memory that `pack_dataset` needs beside its files: short documents, so that what it keeps per document shows."""
    disable_progress_bars()
    offsets = np.arange(0, 8 * n + 1, 8, dtype=np.int32)
    ids = np.full(8 * n, 5, np.int32)
    labels = np.where(np.arange(8 * n) % 8 == 0, -100, 5).astype(np.int32)
    columns = {"input_ids": pa.ListArray.from_arrays(offsets, ids), "labels": pa.ListArray.from_arrays(offsets, labels)}
    with tempfile.TemporaryDirectory() as folder:
        Dataset(pa.table(columns)).save_to_disk(f"{folder}/rows")
        del columns, ids, labels, offsets
        rows = load_from_disk(f"{folder}/rows")
        pack_dataset(rows.select(range(10)), CAPACITY)
        with AnonymousMemory() as peak:
            start = time.perf_counter()
            pack_dataset(rows, CAPACITY, cache_file=f"{folder}/packed.arrow")
            seconds = time.perf_counter() - start
    return {"what": "pack to a file, 8 tokens each", "n": n, "seconds": seconds, "mib": peak.mib}


def sampling(n: int, how: str) -> dict[str, Any]:
    """What one rank spends on choosing its rows: accelerate's shard walks over the batches of all ranks."""
    shard = BatchSamplerShard(BatchSampler(SAMPLERS[how](range(n)), 1, drop_last=False), 512, 0)
    with PeakMemory() as peak:
        start = time.perf_counter()
        for _ in shard:
            pass
        seconds = time.perf_counter() - start
    return {"what": f"sample {how}", "n": n, "seconds": seconds, "mib": peak.mib}


def opening(batches: int) -> dict[str, Any]:
    """A file of many record batches, as packing writes them, opened."""
    with tempfile.TemporaryDirectory() as folder:
        schema = Dataset.from_dict({"seq_lengths": [[1]]}).features.arrow_schema
        with pa.OSFile(f"{folder}/rows.arrow", "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            batch = pa.record_batch([pa.array([[1, 2, 3]], schema.field(0).type)], schema=schema)
            for _ in range(batches):
                writer.write_batch(batch)
        start = time.perf_counter()
        Dataset.from_file(f"{folder}/rows.arrow")
        return {"what": "open a file, per record batch", "n": batches, "seconds": time.perf_counter() - start}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=int, nargs="*", default=[10**6, 10**7, 10**8], help="lengths to plan")
    parser.add_argument("--deal", type=int, nargs="*", default=[100_000, 1_000_000], help="packed rows to deal")
    parser.add_argument("--stream", type=int, default=20_000, help="documents to stream")
    parser.add_argument("--pack", type=int, default=500_000, help="documents of 8 tokens to pack")
    parser.add_argument("--sample", type=int, default=1_000_000, help="rows to sample from")
    parser.add_argument("--read", type=int, default=20_000, help="documents in the file that is read")


def measure(options: argparse.Namespace) -> Measured:
    disable_progress_bars()
    records = [alone(planning, n, seed) for n in options.plan for seed in (None, 0)]
    records += [alone(dealing, n, 64) for n in options.deal]
    records += [streaming(options.stream, size) for size in (1_000, 10_000) if options.stream]
    records += reading(options.read) if options.read else []
    records += [alone(packing, options.pack)] if options.pack else []
    records += [alone(sampling, options.sample, how) for how in SAMPLERS] if options.sample else []
    records += [opening(500)]
    return Measured(records)


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
