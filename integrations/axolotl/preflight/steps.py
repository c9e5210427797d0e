"""How many rows Axolotl trains, and in how many steps.

100 rows, val_set_size: 0.1, micro_batch_size: 2, accumulation 2, 2 epochs   →  90 rows, ⌈90 × 2 / 4⌉ = 45 steps
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sft_plugins.errors import AssetError
from sft_plugins.integrations.config_file import number
from sft_plugins.preflight import Plan

_SEED = 42  # any: Axolotl draws another in every run, which is said of the configuration


def sharded(entry: Mapping[str, Any], data: Mapping[str, Any], path: str) -> Callable[[int], Any] | None:
    """Of so many rows, the numbers of those in the entry's shard (`shards`, `shards_idx`), shuffled by `seed` as by Axolotl."""
    if not entry.get("shards"):
        return None
    shards, index = int(number(entry, "shards", 1, path)), int(entry.get("shards_idx") or 0)
    seed = data.get("seed")
    if not 0 <= index < shards:
        raise AssetError(
            f"{path}: `shards_idx: {index}` of {shards} shards; they are counted from 0.",
            code="bad_config",
            remedy=f"Give 0 to {shards - 1}.",
        )

    def chosen(rows: int) -> Any:
        order = np.random.default_rng(_SEED if seed is None else int(seed)).permutation(rows)
        return order[_shard(rows, shards, index)].tolist()

    return chosen


def trained_rows(data: Mapping[str, Any], path: str) -> Callable[[int], int]:
    """Of so many masked rows, how many are trained: less those of other shards, and those held out by `val_set_size`."""
    held = number(data, "val_set_size", 0, path) if data.get("val_set_size") else 0
    if held == 1:
        raise AssetError(
            f"{path}: `val_set_size: {data['val_set_size']}` would hold out every row.",
            code="bad_config",
            remedy="Give a share below 1, or a number of rows above it.",
        )
    shards, index = data.get("dataset_shard_num"), data.get("dataset_shard_idx")

    def trained(rows: int) -> int:
        if shards and index is not None:
            part = _shard(rows, int(shards), int(index))
            rows = part.stop - part.start
        return max(0, rows - (int(held) if held > 1 else math.ceil(held * rows)))

    return trained


def count_steps(data: Mapping[str, Any]) -> Callable[[Plan, int], int]:
    """Axolotl's steps, of rows as they are trained (packed ones where the run packs)."""

    def counted(plan: Plan, rows: int) -> int:
        per_step = plan.rows_per_step
        if plan.packer == "host":  # whole steps of each epoch, and the last of each left out where it drops one
            steps = math.floor(max(1, rows // per_step) * plan.epochs)
            steps -= math.ceil(plan.epochs) if data.get("dataloader_drop_last") else 0
        elif plan.packer == "sft_plugins":  # which fills up the last step of an epoch
            steps = math.ceil(math.ceil(rows / per_step) * plan.epochs)
        else:
            steps = math.ceil(rows * plan.epochs / per_step)
        return steps if plan.max_steps is None else plan.max_steps  # beyond the epochs, too

    return counted


def _shard(rows: int, shards: int, index: int) -> slice:
    """The `index`-th of `shards` runs of rows, the first of which are one longer where they do not divide."""
    size, more = divmod(rows, shards)
    start = index * size + min(index, more)
    return slice(start, start + size + (index < more))
