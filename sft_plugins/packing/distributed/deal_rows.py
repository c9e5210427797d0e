"""Which rank gets which packed row, so that no rank waits for another.

Invariant: the dealt rows are the given rows, each once, in another order; and under a trainer that keeps that order, every
micro-batch puts rows of nearly equal cost on all ranks, and every optimizer step nearly equal sums of cost.

Packed rows hold equally many tokens but not equally much attention: a row of documents of l tokens costs a·Σ l + b·Σ l².
Ranks wait for the dearest among them at every optimizer step (DDP), or in every micro-batch (FSDP, ZeRO-3).

    costs 9 1 8 2 5 6 on 2 ranks: steps (9 1) (8 2) (5 6) take 9 + 8 + 6 = 23, and a third of 2 · 23 is waiting
    dealt, that is sorted, cut into runs of 2, the runs shuffled: steps (2 1) (9 8) (6 5) take 2 + 9 + 6 = 17

How rows reach ranks: accelerate hands batch k of the sampler to rank k mod ranks, in turns (`BatchSamplerShard`), and the
sampler keeps the dataset's order only under `train_sampling_strategy="sequential"`. By default it shuffles and the dealing
is lost; `check_dealing` refuses such a trainer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler

from sft_plugins._options import whole_number
from sft_plugins.errors import PackingError
from sft_plugins.packing.distributed.row_cost import RowCost, packed_rows

Ints = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class BalanceReport:
    """What dealing does to waiting, by the cost model. A step lasts as long as its dearest rank.

    Attributes:
        rows, ranks, accumulation, batch_size: rows dealt, and how the trainer takes them.
        steps: optimizer steps of an epoch.
        repeated: rows that accelerate trains twice, to give every rank equally many (its `even_batches`): dealing cannot
            help that, `even_rows(packed, ranks · batch_size)` before it can.
        idle_shuffled: share of all ranks' time spent waiting under the shuffling sampler, the trainer's default.
        idle_dealt: the same with the dealt rows.
        spread_shuffled, spread_dealt: standard deviation ÷ mean, over full steps, of what a step costs. It is the price:
            with `accumulation · batch_size` 1 the rows of a step are alike, so steps differ, some of one long document
            per row and some of many short ones, where shuffled steps all are mixtures. From 4 on it is small.
    """

    rows: int
    ranks: int
    accumulation: int
    batch_size: int
    steps: int
    repeated: int
    cost: RowCost
    idle_shuffled: float
    idle_dealt: float
    spread_shuffled: float
    spread_dealt: float

    @property
    def speedup(self) -> float:
        """Time of an epoch shuffled ÷ dealt, if nothing but this cost took time."""
        return (1 - self.idle_dealt) / (1 - self.idle_shuffled)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self) | {"speedup": self.speedup}

    def __str__(self) -> str:
        twice = f"; {self.repeated} rows are trained twice to fill the last batch" if self.repeated else ""
        return (
            f"{self.rows:,} rows on {self.ranks} ranks, {self.steps:,} steps: ranks wait {self.idle_dealt:.1%} of the time, "
            f"shuffled {self.idle_shuffled:.1%} ({self.speedup:.2f}× as fast). Cost per step varies by "
            f"{self.spread_dealt:.0%}, shuffled by {self.spread_shuffled:.0%}{twice}."
        )


class Dealt(NamedTuple):
    """The rows in the order for training, and what that order is worth."""

    dataset: Dataset
    report: BalanceReport


def deal_rows(
    packed: Dataset,
    *,
    ranks: int,
    accumulation: int = 1,
    batch_size: int = 1,
    cost: RowCost | None = None,
    seed: int = 0,
) -> Dealt:
    """Order packed rows so that all ranks have equally much to do. Train with `train_sampling_strategy="sequential"`.

    Rows are sorted by cost and cut into runs of one row per rank. An optimizer step takes K = accumulation · batch_size
    runs, one from each K-th of the sorted runs, and within a step the rank that is behind takes the dearest row of the
    next run. Which runs meet, their order in the step and the order of the steps are random, by `seed`. The trainer
    repeats the order every epoch.

    Args:
        packed: rows with `seq_lengths`, as `pack_dataset` makes them.
        ranks: data-parallel processes.
        accumulation: `gradient_accumulation_steps`.
        batch_size: `per_device_train_batch_size`, packed rows.
        cost: what a row costs; by default Σ l², attention alone. `RowCost.of(model)` weighs it with the rest.
        seed: the same seed, rows and options give the same order in every process.

    Returns:
        The rows (`packed.select`: nothing is copied), and a `BalanceReport`.

    Raises:
        PackingError: `bad_option`, `bad_schema` (not packed), `streaming_dataset`, `too_few_rows`; with the row:
            `boundaries`.

    Example:
        >>> packed = Dataset.from_dict({"seq_lengths": [[3], [1, 1, 1], [3], [1, 1, 1]]})
        >>> dealt, report = deal_rows(packed, ranks=2)
        >>> [len(lengths) for lengths in dealt[:2]["seq_lengths"]] in ([1, 1], [3, 3])
        True
        >>> report.idle_dealt
        0.0
    """
    sizes = {"ranks": ranks, "accumulation": accumulation, "batch_size": batch_size}
    ranks, accumulation, batch_size = (whole_number(name, value, PackingError) for name, value in sizes.items())
    _check_packed(packed, ranks * batch_size)
    cost = RowCost() if cost is None else cost
    costs = cost.per_row(packed)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(costs))
    order = _deal(costs, shuffled, ranks, accumulation, batch_size, rng)
    before, after = (_rank_costs(costs[o], ranks, accumulation, batch_size) for o in (shuffled, order))
    full = len(costs) // (ranks * accumulation * batch_size)
    report = BalanceReport(
        rows=len(costs),
        ranks=ranks,
        accumulation=accumulation,
        batch_size=batch_size,
        steps=len(after),
        repeated=-len(costs) % (ranks * batch_size),
        cost=cost,
        idle_shuffled=_idle_share(before),
        idle_dealt=_idle_share(after),
        spread_shuffled=_spread(before[:full]),
        spread_dealt=_spread(after[:full]),
    )
    return Dealt(packed.select(order), report)


def check_dealing(trainer: Any, report: BalanceReport) -> None:
    """Show that a built trainer takes rows as they were dealt. Call it before `trainer.train()`, on every rank.

    Raises:
        PackingError: `not_dealt` where its sampler would shuffle, or where it has other ranks, batches or rows than
            `report` says.
    """
    loader = trainer.get_train_dataloader()
    batches = loader.batch_sampler
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    ranks, batch_size = getattr(batches, "num_processes", world), getattr(batches, "batch_size", None)
    if batch_size is not None and getattr(batches, "split_batches", False):
        batch_size //= ranks
    while hasattr(batches, "batch_sampler"):  # accelerate's shards wrap the sampler of batches
        batches = batches.batch_sampler
    sampler = getattr(batches, "sampler", None)
    if type(sampler) is not SequentialSampler:
        raise PackingError(
            f"the trainer draws rows with {type(sampler).__name__}, so what was dealt to a rank goes to another",
            code="not_dealt",
            remedy='{no_other_order:train_sampling_strategy="sequential" in the training arguments}',
        )
    found = {
        "ranks": ranks,
        "batch_size": batch_size,
        "accumulation": trainer.args.gradient_accumulation_steps,
        "rows": len(loader.dataset),
    }
    if differ := [
        f"{name} {got}, dealt for {getattr(report, name)}"
        for name, got in found.items()
        if got != getattr(report, name)
    ]:
        raise PackingError(
            f"the trainer has {'; '.join(differ)}", code="not_dealt", remedy="{no_deal:deal for this trainer}"
        )


def _check_packed(packed: Dataset, needed: int) -> None:
    packed_rows(packed, call="deal_rows(packed['train'], ranks=…)")
    if len(packed) < needed:
        raise PackingError(
            f"{len(packed)} rows and one micro-batch of all ranks takes {needed}",
            code="too_few_rows",
            remedy="{smaller_steps:train on fewer ranks or with smaller batches}",
        )


def _deal(
    costs: Floats, shuffled: Ints, ranks: int, accumulation: int, batch_size: int, rng: np.random.Generator
) -> Ints:
    """Row numbers in the order for training: full steps first, then a step of fewer micro-batches, then what is left.

    Positions in the order go micro-batch by micro-batch, in each rank by rank, in each row by row.
    """
    parts = []
    rest = shuffled  # the rows of the incomplete end are drawn at random
    for micro_batches in (accumulation, 1):
        runs = micro_batches * batch_size
        steps = len(rest) // (runs * ranks)
        here, rest = np.split(rest, [steps * runs * ranks])
        if not steps:
            continue
        # shuffled before: the order of rows of equal cost is random
        here = here[np.argsort(costs[here], kind="stable")].reshape(runs, steps, ranks)
        chosen = rng.permuted(np.arange(steps)[None].repeat(runs, 0), axis=1)
        here = np.take_along_axis(here, chosen[:, :, None], 1)  # [runs, steps, ranks], step s holds here[:, s]
        turns = rng.permuted(np.arange(runs)[:, None].repeat(steps, 1), axis=0)
        here = np.take_along_axis(here, turns[:, :, None], 0)
        here = _even_out(costs, here, rng)
        here = here.reshape(micro_batches, batch_size, steps, ranks).transpose(2, 0, 3, 1)
        parts.append(here.reshape(-1))
    return np.concatenate([*parts, rest])


def _even_out(costs: Floats, rows: Ints, rng: np.random.Generator) -> Ints:
    """`rows` `[runs, steps, ranks]` with the ranks of each run exchanged: who has least so far takes the dearest."""
    rows = rng.permuted(rows, axis=2)
    total = costs[rows[0]]
    for k in range(1, len(rows)):
        dearest_first = np.take_along_axis(rows[k], np.argsort(-costs[rows[k]], axis=1), 1)
        np.put_along_axis(rows[k], np.argsort(total, axis=1), dearest_first, 1)
        total += costs[rows[k]]
    return rows


def _rank_costs(costs: Floats, ranks: int, accumulation: int, batch_size: int) -> Floats:
    """Cost per optimizer step and rank, `[steps, ranks]`, of rows trained in the order given.

    2 ranks, accumulation 2, batch size 1, rows 0 … 4   →   step 0: rank 0 has rows 0, 2 and rank 1 rows 1, 3; step 1: rank 0
    row 4 and rank 1 row 0 again, since accelerate begins anew to fill the last batch.
    """
    per_micro_batch = ranks * batch_size
    micro_batches = -(-len(costs) // per_micro_batch)
    steps = -(-micro_batches // accumulation)
    position = np.arange(micro_batches * per_micro_batch)
    step, rank = position // (per_micro_batch * accumulation), position // batch_size % ranks
    weights = costs[position % len(costs)]
    sums = np.bincount(step * ranks + rank, weights, steps * ranks)
    return sums.astype(np.float64, copy=False).reshape(steps, ranks)


def _idle_share(rank_costs: Floats) -> float:
    """1 − what all ranks do ÷ what they could do while the dearest rank of each step is busy."""
    lasts = rank_costs.max(1).sum() * rank_costs.shape[1]
    return float(max(0.0, 1 - rank_costs.sum() / lasts))


def _spread(rank_costs: Floats) -> float:
    steps = rank_costs.sum(1)
    return float(steps.std() / steps.mean()) if len(steps) else 0.0
