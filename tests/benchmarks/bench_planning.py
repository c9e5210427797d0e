"""Planner beside a stable sort, TRL's best-fit decreasing, and Axolotl's packer, lightbinpack, seqpacker where installed.

    python tests/benchmarks/bench_planning.py [--n 100000 1000000] [--repeats 3] [--json FILE]

Lengths are lognormal(6, .9) clipped to [8, 4096], capacity 4096, from `numpy.random.default_rng(--seed)`. Times are the
best of `--repeats`, after one call that compiles; TRL's is taken once, since it takes seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import Measured, script

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


def axolotl_bins(lengths: list[int]) -> int:
    """Axolotl's parallel first-fit decreasing, as `MultipackBatchSampler` calls it: groups of 100,000, in one process."""
    from axolotl.utils.samplers.multipack import pack_parallel

    sizes = np.asarray(lengths, np.int32)
    return len(pack_parallel(sizes, CAPACITY, group_size=100_000, bin_size=200, num_processes=1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, nargs="+", default=[100_000, 1_000_000], help="documents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--axolotl-up-to", type=int, default=100_000, help="more documents take Axolotl's packer minutes"
    )


def measure(options: argparse.Namespace) -> Measured:
    measured = Measured()
    plan_packs([1, 2, 3], CAPACITY, seed=0)  # compiles, or loads what an earlier run compiled
    for n in options.n:
        beside_each_other(n, options, measured)
    return measured


def beside_each_other(n: int, options: argparse.Namespace, measured: Measured) -> None:
    lengths = lognormal(n, options.seed)
    as_list = lengths.tolist()
    bound = -(-int(lengths.sum()) // CAPACITY)

    def take(name: str, run: Callable[[], int | None], repeats: int = options.repeats) -> None:
        try:
            seconds, bins = timed(run, repeats)
        except ImportError as error:
            measured.skipped[name] = f"not installed: {error}"
            return
        above = None if bins is None else bins / bound - 1
        measured.records.append({"n": n, "planner": name, "seconds": seconds, "rows": bins, "above_bound": above})

    def sort() -> None:
        np.argsort(lengths, kind="stable")

    take("stable sort", sort)
    take("plan_packs", lambda: len(plan_packs(lengths, CAPACITY)))
    take("plan_packs, seeded", lambda: len(plan_packs(lengths, CAPACITY, seed=0)))
    take("TRL bfd", lambda: trl_bins(as_list), 1)
    take("lightbinpack obfd", lambda: lightbinpack_bins(as_list))
    take("seqpacker bfd", lambda: seqpacker_bins(as_list))
    if n <= options.axolotl_up_to:
        take("Axolotl multipack", lambda: axolotl_bins(as_list), 2)  # the first call compiles
    else:
        measured.skipped[f"Axolotl multipack of {n:,}"] = "--axolotl-up-to"


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
