"""Plans: exactly the bins of item-level best-fit decreasing, whatever the lengths, in time that does not feel n."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sft_plugins.errors import PackingError
from sft_plugins.packing import best_fit, plan
from sft_plugins.packing.plan import PackPlan, plan_packs


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Item by item: the longest document first, into the fullest bin it fits, the one that has been so full longest."""
    bins: list[list[int]] = []
    since: list[int] = []
    clock = itertools.count()
    for length in sorted(lengths, reverse=True):
        fits = [b for b in range(len(bins)) if sum(bins[b]) + length <= capacity]
        if fits:
            b = min(fits, key=lambda b: (capacity - sum(bins[b]), since[b]))
            bins[b].append(length)
            since[b] = next(clock)
        else:
            bins.append([length])
            since.append(next(clock))
    return bins


def compositions(packs: PackPlan, lengths: list[int]) -> list[tuple[int, ...]]:
    return sorted(tuple(lengths[i] for i in pack) for pack in packs)


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths and a capacity; few distinct lengths often, so that ties and whole runs of equal documents occur."""
    capacity = draw(st.integers(1, 60))
    kinds = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=12))
    return draw(st.lists(st.sampled_from(kinds), max_size=80)), capacity


@settings(max_examples=400, deadline=None)
@given(documents(), st.one_of(st.none(), st.integers(0, 5)))
@example(([3, 3, 3, 3, 3], 7), None)  # the last bin takes fewer copies than its room allows
@example(([5, 3, 3, 2, 2, 2], 8), None)
def test_bins_are_those_of_item_level_best_fit_decreasing(case: tuple[list[int], int], seed: int | None) -> None:
    lengths, capacity = case
    packs = plan_packs(lengths, capacity, seed=seed)
    assert compositions(packs, lengths) == sorted(map(tuple, naive_best_fit_decreasing(lengths, capacity)))


@pytest.mark.parametrize("seed", range(8))
def test_bins_stay_those_of_best_fit_decreasing_with_many_bins_waiting_at_each_fill(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 61, 300).tolist()
    packs = plan_packs(lengths, 120, seed=seed)
    assert compositions(packs, lengths) == sorted(map(tuple, naive_best_fit_decreasing(lengths, 120)))


@settings(max_examples=200, deadline=None)
@given(documents(), st.one_of(st.none(), st.integers(0, 5)))
def test_every_document_is_in_exactly_one_pack_and_none_overflows(
    case: tuple[list[int], int], seed: int | None
) -> None:
    """P8: no document lost or duplicated, no crash on empty input or odd capacities."""
    lengths, capacity = case
    packs = plan_packs(lengths, capacity, seed=seed)
    assert sorted(packs.indices.tolist()) == list(range(len(lengths)))
    assert packs.offsets[0] == 0
    assert packs.offsets[-1] == len(lengths)
    assert all(1 <= sum(lengths[i] for i in pack) <= capacity for pack in packs)
    assert packs.lower_bound <= len(packs)
    assert packs.tokens == sum(lengths)


@settings(max_examples=100, deadline=None)
@given(documents())
def test_compiled_loops_do_what_their_python_does(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    if not lengths:
        return
    sizes = np.array(lengths, np.int32)
    room = min(capacity, sum(lengths))
    by_length, starts = best_fit.group_by_length(sizes, np.empty(len(sizes), np.int32), room)
    assert by_length.tolist() == np.argsort(sizes, kind="stable").tolist()
    patterns = best_fit.fill_bins(np.diff(starts), room)
    pattern_of, held = best_fit.list_bins(patterns)
    offsets = np.concatenate(([0], np.cumsum(held)))
    indices = best_fit.deal(patterns, pattern_of, offsets, by_length, starts[:-1])
    assert indices.tolist() == plan_packs(lengths, capacity).indices.tolist()


def test_trl_makes_the_same_packs_when_it_plans_the_whole_dataset_at_once() -> None:
    trl_utils = pytest.importorskip("trl.data_utils")
    lengths = lognormal(500, seed=3).tolist()
    table = pa.table({"input_ids": [[0] * length for length in lengths]})
    theirs = trl_utils._pack_bfd(table, 4096)["seq_lengths"].to_pylist()
    assert compositions(plan_packs(lengths, 4096), lengths) == sorted(map(tuple, theirs))


def lognormal(n: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(6, 0.9, n), 8, 4096).astype(np.int64)


@pytest.mark.parametrize(("seed", "bins", "bound"), [(0, 145_834, 145_823), (1, 145_472, 145_460)])
def test_a_million_lognormal_lengths_need_eleven_or_twelve_bins_more_than_their_volume(
    seed: int, bins: int, bound: int
) -> None:
    """The counts are those of item-level best-fit decreasing with TRL's segment tree, run once over all the lengths."""
    packs = plan_packs(lognormal(1_000_000, seed), 4096, seed=7)
    assert (len(packs), packs.lower_bound) == (bins, bound)
    assert np.bincount(packs.indices, minlength=1_000_000).tolist() == [1] * 1_000_000


def test_equal_lengths_are_shuffled_by_seed_and_nothing_else_changes() -> None:
    lengths = [5, 3] * 200
    plans = {seed: plan_packs(lengths, 8, seed=seed) for seed in (0, 1)}
    again = plan_packs(lengths, 8, seed=0)
    assert again.indices.tolist() == plans[0].indices.tolist()
    assert plans[0].indices.tolist() != plans[1].indices.tolist()
    assert compositions(plans[0], lengths) == compositions(plans[1], lengths)


def test_a_seed_shuffles_documents_of_equal_length_uniformly() -> None:
    """Each of the 4! orders of four equal documents comes up, about equally often (χ² on 23 degrees, p ≈ 1e-6)."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        order = tuple(plan_packs([2] * 4, 8, seed=seed)[0].tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 75


def test_a_seed_shuffles_the_order_of_packs() -> None:
    lengths = list(range(1, 101))
    in_order = [pack.sum() for pack in plan_packs(lengths, 100)]
    shuffled = [pack.sum() for pack in plan_packs(lengths, 100, seed=0)]
    assert sorted(in_order) == sorted(shuffled)
    assert in_order != shuffled


def test_without_a_seed_equal_lengths_keep_the_order_of_the_data() -> None:
    packs = plan_packs([2, 2, 2, 2, 2], 4)
    assert [pack.tolist() for pack in packs] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    "lengths",
    [
        [3, 5, 2],
        (3, 5, 2),
        np.array([3, 5, 2], np.uint16),
        np.array([3, 5, 2], np.int64)[::1],
        torch.tensor([3, 5, 2]),
        pa.array([3, 5, 2], pa.int32()),
        pa.chunked_array([[3, 5], [2]]),
    ],
)
def test_lengths_come_in_any_form(lengths: object) -> None:
    packs = plan_packs(lengths, 8)
    assert [pack.tolist() for pack in packs] == [[1, 0], [2]]


def test_the_plan_is_compact_arrays() -> None:
    packs = plan_packs([3, 5, 2], 8)
    assert (packs.offsets.dtype, packs.indices.dtype) == (np.int64, np.int32)
    assert packs.offsets.tolist() == [0, 2, 3]
    assert packs.indices.tolist() == [1, 0, 2]
    assert packs[-1].tolist() == packs[1].tolist() == [2]
    assert (packs.fill, packs.lower_bound, packs.max_length) == (10 / 16, 2, 8)
    with pytest.raises(IndexError, match="pack 2 of a plan with 2"):
        packs[2]
    with pytest.raises(AttributeError):
        packs.tokens = 0  # type: ignore[misc]


def test_no_documents_need_no_packs() -> None:
    for lengths in ([], np.zeros(0, np.int64)):
        packs = plan_packs(lengths, 8, seed=0)
        assert (len(packs), packs.lower_bound, packs.fill, list(packs)) == (0, 0, 1.0, [])


def test_capacity_of_one_packs_one_token_per_row() -> None:
    assert [pack.tolist() for pack in plan_packs([1, 1, 1], 1)] == [[0], [1], [2]]


def test_a_capacity_beyond_all_tokens_costs_no_memory() -> None:
    assert plan_packs([3, 2], 2**31 - 1).indices.tolist() == [0, 1]


def test_lengths_that_are_all_different_under_a_capacity_far_beyond_4096() -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(1, 200_001))
    packs = plan_packs(lengths, 200_000)
    assert len(packs) == 100_001
    assert packs.lower_bound == 100_001


@pytest.mark.parametrize(
    ("lengths", "code", "row", "words"),
    [
        ([3, 9, 12], "overflow", 1, "the document has 9 tokens and a pack holds 8"),
        ([1, 8, 9], "overflow", 2, "the document has 9 tokens and a pack holds 8"),  # 1 and 8 are just inside
        ([1, 8, 0], "empty_document", 2, "the document is empty"),
        ([1, 8, -1], "bad_lengths", 2, "length -1 is negative"),
        ([3, 0, 2], "empty_document", 1, "the document is empty"),
        ([3, 2, -4], "bad_lengths", 2, "length -4 is negative"),
        ([3, float("nan")], "bad_lengths", 1, "float64"),
        ([3, 2.5], "bad_lengths", 1, "expected one integer per document"),
        ([3, None], "bad_lengths", 1, "object"),
        ([True, False], "bad_lengths", None, "bool"),
        ([[1, 2], [3, 4]], "bad_lengths", None, "shape"),
        (5, "bad_lengths", None, "shape"),
        (["3"], "bad_lengths", None, "expected one integer"),
        (np.array([2**40]), "overflow", 0, "a pack holds 8"),
        (np.array([2**64 - 1], np.uint64), "overflow", 0, "a pack holds 8"),
    ],
)
def test_bad_lengths_are_refused_with_their_row(lengths: object, code: str, row: int | None, words: str) -> None:
    with pytest.raises(PackingError, match=words) as error:
        plan_packs(lengths, 8)
    assert (error.value.code, error.value.row) == (code, row)


@pytest.mark.parametrize("capacity", [0, -1, 2**31, 8.0, "8", None, True, np.float32(8), float("nan")])
def test_bad_capacities_are_refused(capacity: object) -> None:
    with pytest.raises(PackingError, match="expected an integer from 1 to 2147483647") as error:
        plan_packs([1], capacity)  # type: ignore[arg-type]
    assert error.value.code == "bad_capacity"


@pytest.mark.parametrize("capacity", [1, 2**31 - 1])
def test_the_least_and_the_largest_capacity_hold_a_token(capacity: int) -> None:
    assert [pack.tolist() for pack in plan_packs([1], capacity)] == [[0]]


def test_capacity_may_be_a_numpy_integer() -> None:
    assert len(plan_packs([1], np.int64(8))) == 1


def test_the_worked_example_holds() -> None:
    assert doctest.testmod(plan).failed == 0
    assert doctest.testmod(plan).attempted > 0
