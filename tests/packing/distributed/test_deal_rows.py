"""Dealing: the same rows, each once, in an order under which no rank waits; or an error that says why not."""

from __future__ import annotations

import doctest
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments

from sft_plugins.errors import PackingError
from sft_plugins.packing import BlockDiagonalPackingCollator, RowCost, check_dealing, deal_rows, pack_dataset
from sft_plugins.packing.distributed import deal_rows as balance
from testkit.tiny_models import build
from testkit.watched_runs import byte_tokenizer, lora, tiny_model

disable_progress_bars()


def numbered(seq_lengths: list[list[int]]) -> Dataset:
    """Rows that know their number."""
    return Dataset.from_dict({"seq_lengths": seq_lengths, "row": list(range(len(seq_lengths)))})


def documents(n: int, *, seed: int = 0, capacity: int = 64) -> Dataset:
    lengths = np.clip(np.random.default_rng(seed).lognormal(2.5, 0.9, n), 2, capacity).astype(int).tolist()
    return Dataset.from_dict(
        {"input_ids": [[5] * m for m in lengths], "labels": [[-100] + [5] * (m - 1) for m in lengths]}
    )


def steps_by_accelerate(rows: int, *, ranks: int, accumulation: int, batch_size: int) -> list[list[list[int]]]:
    """Positions of the dataset that each rank trains in each optimizer step, `[step][rank]`, as accelerate shards them."""
    shards = []
    for rank in range(ranks):
        sampler = BatchSampler(SequentialSampler(range(rows)), batch_size, drop_last=False)
        shards.append(list(BatchSamplerShard(sampler, ranks, rank)))
    micro_batches = list(zip(*shards, strict=True))
    return [
        [[p for micro in micro_batches[i : i + accumulation] for p in micro[rank]] for rank in range(ranks)]
        for i in range(0, len(micro_batches), accumulation)
    ]


def idle_share(step_costs: list[list[float]]) -> float:
    """Rank by rank: what it waited ÷ what all steps lasted."""
    lasted = waited = 0.0
    for ranks in step_costs:
        for cost in ranks:
            lasted += max(ranks)
            waited += max(ranks) - cost
    return waited / lasted


SHAPES = st.fixed_dictionaries(
    {"ranks": st.integers(1, 5), "accumulation": st.integers(1, 3), "batch_size": st.integers(1, 3)}
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], dict[str, int]]:
    shape = draw(SHAPES)
    least = shape["ranks"] * shape["batch_size"]
    row = st.lists(st.integers(1, 9), min_size=1, max_size=4)
    return draw(st.lists(row, min_size=least, max_size=least + 40)), shape


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 3))
def test_every_row_is_dealt_once_and_the_report_is_that_of_accelerates_shards(
    case: tuple[list[list[int]], dict[str, int]], seed: int
) -> None:
    """P14. Against accelerate's own sampler, rank by rank."""
    seq_lengths, shape = case
    cost = RowCost(linear=2, quadratic=0.5)
    dealt, report = deal_rows(numbered(seq_lengths), **shape, cost=cost, seed=seed)
    assert Counter(dealt["row"]) == Counter(range(len(seq_lengths)))
    assert all(row["seq_lengths"] == seq_lengths[row["row"]] for row in dealt)

    steps = steps_by_accelerate(len(seq_lengths), **shape)
    costs = [sum(2 * m + 0.5 * m * m for m in seq_lengths[row]) for row in dealt["row"]]
    expected = idle_share([[sum(costs[p] for p in rank) for rank in step] for step in steps])
    assert report.idle_dealt == pytest.approx(expected, abs=1e-12)
    assert report.steps == len(steps)
    trained = sum(len(rank) for step in steps for rank in step)
    assert report.repeated == trained - len(seq_lengths)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_ranks_of_a_micro_batch_take_neighbours_of_the_sorted_rows(
    case: tuple[list[list[int]], dict[str, int]],
) -> None:
    """What bounds waiting: no full step holds a run that straddles another, so sums of ranks differ by a row at most."""
    seq_lengths, shape = case
    dealt, _ = deal_rows(numbered(seq_lengths), **shape)
    costs = [sum(m * m for m in lengths) for lengths in dealt["seq_lengths"]]
    ranks, runs = shape["ranks"], shape["accumulation"] * shape["batch_size"]
    full = len(costs) // (ranks * runs)
    found = []
    for step in range(full):
        rows = np.array(costs[step * ranks * runs : (step + 1) * ranks * runs]).reshape(
            shape["accumulation"], ranks, shape["batch_size"]
        )
        for run in rows.transpose(0, 2, 1).reshape(-1, ranks):
            found.append((run.min(), run.max()))
        sums = rows.sum((0, 2))
        assert sums.max() - sums.min() <= max(high - low for low, high in found[-runs:])
    found.sort()
    assert all(high <= low for (_, high), (low, _) in itertools.pairwise(found))


@pytest.mark.parametrize("seed", range(8))
def test_a_step_too_short_for_all_its_micro_batches_is_dealt_too(seed: int) -> None:
    """4 rows for 2 ranks and accumulation 4 are no full step: two micro-batches, of rows of one cost each."""
    dealt, _ = deal_rows(numbered([[1], [9], [1], [9]]), ranks=2, accumulation=4, seed=seed)
    costs = [sum(m * m for m in lengths) for lengths in dealt["seq_lengths"]]
    assert sorted(dealt["row"]) == [0, 1, 2, 3]
    assert costs[0] == costs[1] != costs[2] == costs[3]


def test_the_example_of_the_module() -> None:
    rows = numbered([[3], [1], [2, 2], [1, 1], [2, 1], [2, 1, 1]])  # costs 9 1 8 2 5 6
    assert balance._idle_share(balance._rank_costs(np.array([9.0, 1, 8, 2, 5, 6]), 2, 1, 1)) == pytest.approx(15 / 46)
    dealt, report = deal_rows(rows, ranks=2)
    costs = [sum(m * m for m in lengths) for lengths in dealt["seq_lengths"]]
    assert sorted(tuple(sorted(costs[i : i + 2])) for i in (0, 2, 4)) == [(1, 2), (5, 6), (8, 9)]
    assert report.idle_dealt == pytest.approx(3 / 34)


def test_doctests() -> None:
    assert doctest.testmod(balance).failed == 0


@pytest.mark.parametrize(("ranks", "accumulation", "below"), [(8, 1, 0.02), (64, 1, 0.05), (8, 4, 0.02), (64, 4, 0.05)])
def test_dealt_ranks_hardly_wait(ranks: int, accumulation: int, below: float) -> None:
    """On packed lognormal documents, where shuffled rows keep them waiting for a tenth of the time and more."""
    packed = pack_dataset(documents(40_000), 64, seed=0).dataset
    _, report = deal_rows(packed, ranks=ranks, accumulation=accumulation)
    assert report.idle_dealt < below < 0.1 < report.idle_shuffled
    assert report.speedup == pytest.approx((1 - report.idle_dealt) / (1 - report.idle_shuffled))


def test_with_accumulation_a_step_is_a_mixture_again() -> None:
    """The price: alone, a step's rows are alike; four runs from four quarters of the data vary less than a tenth as much."""
    packed = pack_dataset(documents(40_000), 64, seed=0).dataset
    spread = {k: deal_rows(packed, ranks=8, accumulation=k)[1] for k in (1, 4)}
    assert spread[1].spread_dealt > 2 * spread[1].spread_shuffled
    assert spread[4].spread_dealt < spread[1].spread_dealt / 3


def test_the_order_is_random_in_the_large_and_repeats_with_the_seed() -> None:
    packed = pack_dataset(documents(20_000), 64, seed=0).dataset
    one, again, other = (deal_rows(packed, ranks=4, seed=seed).dataset for seed in (0, 0, 1))
    assert one["seq_lengths"][:] == again["seq_lengths"][:] != other["seq_lengths"][:]
    costs = RowCost().per_row(one)
    steps = costs[: len(costs) // 4 * 4].reshape(-1, 4).mean(1)
    first, second = np.array_split(steps, 2)
    assert abs(first.mean() - second.mean()) < 4 * steps.std() * np.sqrt(2 / len(first))
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1]) < 4 / np.sqrt(len(steps))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_no_rank_is_the_dearest_more_often_than_others(accumulation: int) -> None:
    dealt, _ = deal_rows(numbered([[tokens] for tokens in range(1, 12_001)]), ranks=4, accumulation=accumulation)
    sums = RowCost().per_row(dealt).reshape(-1, accumulation, 4).sum(1)
    assert np.bincount(sums.argmax(1), minlength=4).min() > len(sums) / 5


def test_costs_are_read_through_selections_and_several_chunks() -> None:
    from datasets import concatenate_datasets

    rows = concatenate_datasets([numbered([[3, 2], [7]]), numbered([[1], [4, 4]])]).select([3, 0, 2])
    assert RowCost(linear=10, quadratic=1).per_row(rows).tolist() == [112.0, 63.0, 11.0]


@pytest.mark.parametrize("wrap", [False, True])
def test_cost_of_a_model_counts_its_matrix_products(wrap: bool) -> None:
    """Against torch's own counter of floating-point operations, at two lengths; LoRA's are part of it."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model()
    model = lora(model) if wrap else model
    cost = RowCost.of(model)
    counted = []
    for tokens in (16, 48):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=False)
        counted.append(counter.get_total_flops())
    # torch counts all l² scores, a causal kernel computes half of them: the solution of n·a + n²·2b.
    quadratic = (counted[1] / 48 - counted[0] / 16) / (48 - 16)
    assert cost.quadratic == pytest.approx(quadratic / 2, rel=0.02)
    assert cost.linear == pytest.approx(counted[0] / 16 - 16 * quadratic, rel=0.02)


def test_cost_of_a_mixture_of_experts_is_for_the_caller_to_say() -> None:
    with pytest.raises(PackingError, match="no dense decoder with attention") as error:
        RowCost.of(build("mixtral").model)
    assert error.value.code == "bad_option"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0}, "ranks is 0; expected an integer from 1 on"),
        ({"ranks": True}, "ranks is True"),
        ({"ranks": 2.0}, "ranks is 2.0"),
        ({"ranks": 1, "accumulation": 0}, "accumulation is 0"),
        ({"ranks": 1, "batch_size": -1}, "batch_size is -1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PackingError, match=message) as error:
        deal_rows(numbered([[1], [2]]), **options)
    assert error.value.code == "bad_option"


@pytest.mark.parametrize("terms", [(0, 0), (-1, 1), (float("nan"), 1), (float("inf"), 1)])
def test_a_cost_that_is_none_is_refused(terms: tuple[float, float]) -> None:
    with pytest.raises(PackingError, match="expected two numbers from 0 on") as error:
        RowCost(linear=terms[0], quadratic=terms[1])
    assert error.value.code == "bad_option"


def test_rows_that_cannot_be_dealt_are_refused() -> None:
    packed = numbered([[1], [2], [3]])
    for rows, ranks, code, message in [
        (documents(4), 2, "bad_schema", "no 'seq_lengths'"),
        (packed.to_iterable_dataset(), 2, "streaming_dataset", "IterableDataset, and all of its rows must be there"),
        (packed.to_list(), 2, "bad_schema", "got list"),
        (packed, 4, "too_few_rows", "3 rows and one micro-batch of all ranks takes 4"),
        (numbered([[1], [], [3]]), 2, "boundaries", r"\(row 1\) seq_lengths is empty"),
        (numbered([[1], [2, None], [3]]), 2, "bad_schema", r"\(row 1\) column 'seq_lengths' holds a null"),
    ]:
        with pytest.raises(PackingError, match=message) as error:
            deal_rows(rows, ranks=ranks)
        assert error.value.code == code
    with pytest.raises(PackingError, match="takes 4"):
        deal_rows(packed, ranks=2, batch_size=2)


def trainer_of(rows: Dataset, folder: Path, **arguments: Any) -> Trainer:
    model = tiny_model()
    own = {"per_device_train_batch_size": 1, "use_cpu": True, "remove_unused_columns": False, "report_to": "none"}
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **own | arguments),
        train_dataset=rows,
        data_collator=BlockDiagonalPackingCollator(byte_tokenizer(), model=model),
    )


def packed_rows() -> Dataset:
    return pack_dataset(documents(40), 64).dataset


def test_a_trainer_keeps_the_dealt_order_only_when_it_samples_in_sequence(tmp_path: Path) -> None:
    """The rows that a real Trainer's own dataloader yields, and what `check_dealing` says of it."""
    dealt, report = deal_rows(packed_rows(), ranks=1, accumulation=2)
    options = {"gradient_accumulation_steps": 2}
    trainer = trainer_of(dealt, tmp_path, **options, train_sampling_strategy="sequential")
    check_dealing(trainer, report)
    drawn = [batch["cu_seq_lens_q"].diff().tolist() for batch in trainer.get_train_dataloader()]
    assert drawn == dealt["seq_lengths"][:]

    with pytest.raises(PackingError, match=r"RandomSampler.*sequential") as error:
        check_dealing(trainer_of(dealt, tmp_path, **options), report)
    assert error.value.code == "not_dealt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_accumulation_steps": 4}, "accumulation 4, dealt for 2"),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, "batch_size 2, dealt for 1"),
    ],
)
def test_a_trainer_of_another_shape_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    dealt, report = deal_rows(packed_rows(), ranks=1, accumulation=2)
    with pytest.raises(PackingError, match=message):
        check_dealing(trainer_of(dealt, tmp_path, train_sampling_strategy="sequential", **arguments), report)


def test_a_trainer_with_other_rows_or_ranks_is_refused(tmp_path: Path) -> None:
    dealt, report = deal_rows(packed_rows(), ranks=2)
    with pytest.raises(PackingError, match="ranks 1, dealt for 2") as error:
        check_dealing(trainer_of(dealt, tmp_path, train_sampling_strategy="sequential"), report)
    assert error.value.code == "not_dealt"
    dealt, report = deal_rows(packed_rows(), ranks=1)
    fewer = dealt.select(range(3))
    with pytest.raises(PackingError, match="rows 3, dealt for"):
        check_dealing(trainer_of(fewer, tmp_path, train_sampling_strategy="sequential"), report)


@pytest.mark.parametrize("split", [False, True])
def test_ranks_of_accelerates_shards_are_seen(split: bool) -> None:
    dealt, report = deal_rows(packed_rows(), ranks=2, batch_size=2)
    sampler = BatchSampler(SequentialSampler(range(len(dealt))), 4 if split else 2, drop_last=False)

    class OneOfTwo:
        args = type("Arguments", (), {"gradient_accumulation_steps": 1})

        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(dealt, batch_sampler=BatchSamplerShard(sampler, 2, 0, split_batches=split))

    check_dealing(OneOfTwo(), report)


def test_the_report_says_what_waiting_costs_and_what_dealing_it_away_costs() -> None:
    report = deal_rows(numbered([[3], [1], [2, 2], [1, 1], [2, 1]]), ranks=2).report
    assert str(report).startswith("5 rows on 2 ranks, 3 steps: ranks wait ")
    assert "1 rows are trained twice" in str(report)
    assert report.to_dict()["cost"] == {"linear": 0.0, "quadratic": 1.0}
