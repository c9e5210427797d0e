"""Planner beside a stable sort, TRL's best-fit decreasing, and seqpacker/lightbinpack where they install.

    python tests/benchmarks/bench_planning.py [--n 1000000] [--repeats 3] [--json FILE]

Lengths are lognormal(6, .9) clipped to [8, 4096], capacity 4096, from `numpy.random.default_rng(--seed)`. Times are the
best of `--repeats`, after one call that compiles; TRL's is taken once, since it takes seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sft_plugins.packing.plan import plan_packs

CAPACITY = 4096


def lognormal(n: int, seed: int) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(6, 0.9, n), 8, CAPACITY).astype(np.int64)


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - start)
    return best, result


def trl_bins(lengths: list[int]) -> int:
    """The loop of `trl.data_utils._pack_bfd` on all lengths at once, without the tokens it moves afterwards."""
    from collections import defaultdict, deque

    from trl.data_utils import _SegmentTree

    tree = _SegmentTree(CAPACITY)
    tree.add(CAPACITY)
    waiting: dict[int, deque[list[int]]] = defaultdict(deque)
    bins: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        space = tree.search(lengths[document])
        if space < CAPACITY:
            pack = waiting[space].popleft()
            if not waiting[space]:
                tree.remove(space)
        else:
            pack = []
            bins.append(pack)
        pack.append(document)
        space -= lengths[document]
        waiting[space].append(pack)
        if space > 0:
            tree.add(space)
    return len(bins)


def seqpacker_bins(lengths: list[int]) -> int:
    import seqpacker

    return len(seqpacker.pack_sequences(lengths, CAPACITY, strategy="bfd").bins)


def lightbinpack_bins(lengths: list[int]) -> int:
    import lightbinpack

    return len(lightbinpack.obfd(lengths, CAPACITY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1_000_000, help="documents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the figures here too")
    options = parser.parse_args()

    lengths = lognormal(options.n, options.seed)
    as_list = lengths.tolist()
    bound = -(-int(lengths.sum()) // CAPACITY)
    plan_packs(lengths[:10], CAPACITY, seed=0)  # compiles, or loads what an earlier run compiled

    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}

    def measure(name: str, run: Callable[[], Any], repeats: int, bins: Callable[[Any], int | None]) -> None:
        try:
            seconds, result = timed(run, repeats)
        except ImportError as error:
            skipped[name] = f"not installed: {error}"
            return
        rows.append({"name": name, "seconds": seconds, "bins": bins(result)})

    measure("np.argsort(kind='stable')", lambda: np.argsort(lengths, kind="stable"), options.repeats, lambda _: None)
    measure("plan_packs", lambda: plan_packs(lengths, CAPACITY), options.repeats, len)
    measure("plan_packs(seed=0)", lambda: plan_packs(lengths, CAPACITY, seed=0), options.repeats, len)
    measure("TRL best-fit decreasing", lambda: trl_bins(as_list), 1, int)
    measure("lightbinpack obfd", lambda: lightbinpack_bins(as_list), options.repeats, int)
    measure("seqpacker bfd", lambda: seqpacker_bins(as_list), options.repeats, int)

    sort = rows[0]["seconds"]
    table = Table(title=f"{options.n:,} lengths, capacity {CAPACITY:,}, volume bound {bound:,} (seed {options.seed})")
    for heading in ("planner", "seconds", "× sort", "bins"):
        table.add_column(heading, justify="left" if heading == "planner" else "right")
    for row in rows:
        row["sorts"] = row["seconds"] / sort
        bins = "" if row["bins"] is None else f"{row['bins']:,}"
        table.add_row(row["name"], f"{row['seconds']:.4f}", f"{row['sorts']:.2f}", bins)
    console = Console()
    console.print(table)
    for name, reason in skipped.items():
        console.print(f"skipped {name}: {reason}")
    if options.json:
        figures = {"n": options.n, "seed": options.seed, "bound": bound, "rows": rows, "skipped": skipped}
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
