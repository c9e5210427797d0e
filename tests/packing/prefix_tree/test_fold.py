"""Folding: what is trained goes in and comes out as often, no row loses a token, and no tree outgrows its row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_plugins.packing.arrow import TokenColumn
from sft_plugins.packing.compiled import compiled
from sft_plugins.packing.prefix_tree import beginnings
from sft_plugins.packing.prefix_tree import fold as module
from sft_plugins.packing.prefix_tree.fold import Forest, fold
from sft_plugins.packing.prefix_tree.order import sort_rows
from sft_plugins.packing.prefix_tree.rows import lay
from sft_plugins.packing.prefix_tree.share import branches
from testkit.prefix_forest import Row, fold_slowly, forests, paths_of, segments_of, trained


def columns(rows: list[Row], chunks: int = 1) -> tuple[TokenColumn, TokenColumn]:
    """The rows as columns of several Arrow chunks."""
    made = []
    for part in (0, 1):
        arrays = [np.array(row[part], np.int32) for row in rows]
        pieces = [piece for piece in np.array_split(np.arange(len(rows)), chunks) if len(piece)]
        values = [np.concatenate([arrays[i] for i in piece]) for piece in pieces]
        length = np.array([len(array) for array in arrays], np.int64)
        chunk = np.concatenate([np.full(len(piece), k) for k, piece in enumerate(pieces)])
        start = np.concatenate([np.cumsum(length[piece]) - length[piece] for piece in pieces])
        made.append(TokenColumn(values, chunk, start, length))
    return made[0], made[1]


def folded(rows: list[Row], capacity: int = 10**6, *, least: int = 1, chunks: int = 1) -> tuple[Forest, list[Row]]:
    """The forest, and the paths of its trees, each tree in a row of its own."""
    ids, labels = columns(rows, chunks)
    forest = fold(ids, labels, ids.length, capacity, least=least)
    trees = np.arange(len(forest.tokens))
    laid = lay(forest, trees, np.arange(len(trees) + 1), np.arange(len(rows)), ids, labels)
    paths: list[Row] = []
    for k in trees:
        here, tokens = slice(*laid.in_segments[k : k + 2]), slice(*laid.in_tokens[k : k + 2])
        assert tokens.stop - tokens.start == forest.tokens[k]
        packed = {"input_ids": laid.ids[tokens].tolist(), "labels": laid.labels[tokens].tolist()}
        names = {"seq_lengths": laid.lengths, "seq_depths": laid.depths, "seq_parents": laid.parents}
        packed |= {name: values[here].tolist() for name, values in names.items()}
        paths += paths_of(segments_of(packed))
    return forest, paths


@settings(max_examples=300, deadline=None)
@given(forests(), st.integers(1, 3), st.sampled_from([1, 1, 2, 4]))
def test_what_is_trained_comes_out_as_often_and_every_row_is_a_path(rows: list[Row], chunks: int, least: int) -> None:
    _, paths = folded(rows, least=least, chunks=chunks)
    assert trained(paths) == trained(rows)
    beginnings = {tuple(ids[:end]) for ids, _ in paths for end in range(1, len(ids) + 1)}
    assert all(tuple(ids) in beginnings for ids, _ in rows)


@settings(max_examples=300, deadline=None)
@given(forests(), st.integers(0, 40))
def test_trees_are_cut_where_they_do_not_fit(rows: list[Row], more: int) -> None:
    capacity = max(len(ids) for ids, _ in rows) + more
    whole, _ = folded(rows)
    forest, paths = folded(rows, capacity)
    assert forest.tokens.max() <= capacity
    assert trained(paths) == trained(rows)
    assert (forest.cuts > 0) == (forest.repeated > 0)
    if not forest.cuts:
        assert forest.tokens.sum() == whole.tokens.sum()


def test_a_tree_is_cut_where_little_is_repeated() -> None:
    """Nine conversations of four turns behind one system prompt of ten tokens; a row holds two and a half of them."""
    rows: list[Row] = []
    for talk in range(9):
        history = [*range(10), *(100 * (talk + 1) + token for token in range(15))]
        for turn in range(4):
            said = 10 + 5 * turn
            ids = [*history[:said], 50 + turn, 60 + talk]
            rows.append((ids, [-100] * said + ids[said:]))
    one = folded(rows[:4])[0].tokens.sum()
    forest, paths = folded(rows, int(2.5 * one))
    assert trained(paths) == trained(rows)
    assert len(forest.tokens) == 4
    assert forest.cuts == 3
    assert forest.repeated == 3 * 9  # the system prompt up to its last token, and no turn of any conversation


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_what_a_row_adds_is_all_that_branches_from_it(rows: list[tuple[int, int]]) -> None:
    length = np.array([size for size, _ in rows])
    shared = np.array([min(size, common) for size, common in rows])
    added = [size - common + 1 if common < size else 0 for size, common in zip(length, shared, strict=True)]
    order = np.arange(len(rows))[::-1]
    found = compiled(branches)(length[order], order, shared)
    for first in range(len(rows)):
        end = next((i for i in range(first + 1, len(rows)) if shared[i] <= shared[first]), len(rows))
        assert found[first] == sum(added[first:end])


@settings(max_examples=300, deadline=None)
@given(forests())
def test_the_slow_fold_trains_the_same_and_shares_no_more(rows: list[Row]) -> None:
    """Where rows train one token twice, which of them share what is left differs; elsewhere the fold is as tight."""
    slow = fold_slowly(rows)
    forest, paths = folded(rows)
    assert trained(paths_of(slow)) == trained(paths) == trained(rows)
    if max(trained(rows).values(), default=1) == 1:
        assert forest.tokens.sum() <= sum(len(tokens) for tokens, *_ in slow)


@pytest.mark.parametrize(
    ("branches", "trains"),
    [
        ([[90], [91], [92]], [[], [5], [2, 6]]),
        ([[50], [60, 61, 62, 70], [60, 61, 62, 71], [60, 61, 62, 72]], [[], [], [12], [9, 10]]),
    ],
    ids=["behind another row's", "across a fork"],
)
def test_what_several_rows_train_of_a_shared_beginning_is_kept_apart(
    branches: list[list[int]], trains: list[list[int]]
) -> None:
    rows: list[Row] = []
    for branch, places in zip(branches, trains, strict=True):
        ids = [*range(1, 11), *branch]
        rows.append((ids, [token if place in (*places, len(ids) - 1) else -100 for place, token in enumerate(ids)]))
    forest, paths = folded(rows)
    assert trained(paths) == trained(rows)
    assert forest.tokens.tolist() == [len(set().union(*(ids for ids, _ in rows))) + len(forest.lengths) - 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12), st.integers(1, 3))
def test_rows_that_begin_alike_stand_together(ids: list[list[int]], chunks: int) -> None:
    column, _ = columns([(row, row) for row in ids], chunks)
    order = np.arange(len(ids))
    sort_rows(column.values, column.chunk, column.start, column.length, order)
    assert order.tolist() == sorted(range(len(ids)), key=lambda i: [*ids[i], 99])


def test_the_worked_example() -> None:
    """DESIGN: A B C D and A B E F share A B; the branch begins with the shared token that it goes on from."""
    forest, paths = folded([([1, 2, 3, 4], [-100, -100, 3, 4]), ([1, 2, 5, 6], [-100, -100, 5, 6])])
    assert forest.parents.tolist() == [-1, 0]
    assert forest.depths.tolist() == [0, 1]
    assert forest.lengths.tolist() == [4, 3]
    assert paths == [([1, 2, 3, 4], [-100, -100, 3, 4]), ([1, 2, 5, 6], [-100, -100, 5, 6])]


@pytest.mark.parametrize(
    ("rows", "lengths"),
    [
        ([([1, 2, 3], [-100, 2, 3])] * 2, [3, 3]),  # both train token 2: nothing but token 1 is common
        ([([1, 2, 3], [-100, -100, 3])] * 3, [3, 2, 2]),  # identical rows count as often as they come
        ([([1, 2, 3, 4], [-100, -100, -100, 4]), ([1, 2, 3], [-100, -100, 3])], [4]),  # a beginning is there already
        ([([1, 2, 3], [-100, -100, 3]), ([1, 2, 3, 4, 5], [-100, -100, 3, -100, 5])], [5, 2]),  # token 3 twice
        ([([1], [-100]), ([1], [-100])], [1]),
        ([([1, 2], [-100, 2]), ([3, 2], [-100, 2])], [2, 2]),
    ],
)
def test_identical_rows_and_beginnings_of_rows(rows: list[Row], lengths: list[int]) -> None:
    forest, paths = folded(rows)
    assert forest.lengths.tolist() == lengths
    assert trained(paths) == trained(rows)


@settings(max_examples=200, deadline=None)
@given(forests(), st.sampled_from([1, 2, 4]))
def test_a_look_at_beginnings_leaves_out_no_row_that_shares(rows: list[Row], least: int) -> None:
    """The cheap look decides who is folded at all: with it the trees are those of a fold of every row."""
    looked, _ = folded(rows, least=least)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "may_share", lambda ids, lengths, least: np.arange(len(lengths)))
        every, _ = folded(rows, least=least)
    assert sorted(looked.tokens.tolist()) == sorted(every.tokens.tolist())
    assert (looked.cuts, len(looked.rows), looked.shared) == (every.cuts, len(every.rows), every.shared)
    long = [([index, *range(5, 30)], [-100, *range(5, 30)]) for index in range(40, 60)]
    apart, paths = folded([*rows, *long], least=least)
    assert trained(paths) == trained([*rows, *long])
    assert len(apart.tokens) == len(every.tokens) + 20


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=20),
    *(st.integers(1, most) for most in (7, 3, 4)),
)
def test_the_look_keeps_the_rows_that_another_begins_like_and_no_others(
    ids: list[list[int]], longest: int, chunks: int, least: int
) -> None:
    column, _ = columns([(row, row) for row in ids], chunks)
    cut = [row[:longest] for row in ids]
    ends = [min(len(row), least + 1) for row in cut]  # what must be equal, and is all of a row that is as short

    def alike(i: int, j: int) -> bool:
        end = min(ends[i], ends[j])
        return i != j and cut[i][:end] == cut[j][:end]

    expected = [i for i in range(len(ids)) if any(alike(i, j) for j in range(len(ids)))]
    assert beginnings.may_share(column, np.array([*map(len, cut)]), least).tolist() == expected


def test_one_short_row_puts_no_other_through_the_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    compile_ = module.compiled

    def watched(function: Any) -> Any:
        if function is not sort_rows:
            return compile_(function)
        return lambda *arguments: seen.append(len(arguments[4])) or compile_(function)(*arguments)

    monkeypatch.setattr(module, "compiled", watched)
    rows = [([number] * 30, [-100, *[number] * 29]) for number in range(3, 40)]
    folded([*rows, ([90, 91], [-100, 91])], least=16)
    assert seen == []
    folded([*rows, ([7, 7], [-100, -100])], least=16)
    assert seen == [2]  # the short row, and the one that it begins


def test_forks_that_share_little_are_not_taken() -> None:
    rows = [([1, 2, 3, number], [-100, -100, -100, number]) for number in (7, 8)]
    assert len(folded(rows, least=2)[0].tokens) == 1
    assert len(folded(rows, least=3)[0].tokens) == 2
    assert module.LEAST > 1


def test_plain_python_and_numba_fold_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for _ in range(200):
        ids = rng.integers(0, 2, rng.integers(1, 12)).tolist()
        rows.append((ids, [-100, *(t if rng.random() < 0.3 else -100 for t in ids[1:])]))
    fast = folded(rows, 40)

    for compiling in (module, beginnings):
        monkeypatch.setattr(compiling, "compiled", lambda function: function)
    with np.errstate(over="ignore"):  # hashes wrap
        slow = folded(rows, 40)
    assert slow[1] == fast[1]
    assert slow[0].cuts == fast[0].cuts > 0
