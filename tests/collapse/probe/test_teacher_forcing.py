"""Held-out rows: which are judged, and batches that never hold more tokens than they may, padding counted."""

from __future__ import annotations

import pytest

from sft_plugins.collapse.probe.sampling import Sample
from sft_plugins.collapse.probe.teacher_forcing import LabelledText, eval_rows, frozen_rows, plan_rows
from sft_plugins.errors import CollapseError
from testkit.watched_runs import byte_tokenizer


def text(length: int) -> LabelledText:
    ids = tuple(range(5, 5 + length))
    return LabelledText(ids, (-100, *ids[1:]))


@pytest.mark.parametrize(
    ("lengths", "batches"),
    [
        ([4, 4, 4], [(0, 1, 2)]),  # 12 tokens, all there is room for
        ([4, 5, 4], [(0, 2), (1,)]),  # three rows padded to 5 would be 15
        ([3, 6, 6], [(0, 1), (2,)]),  # all three would be 18
        ([12, 1], [(1,), (0,)]),
        ([13, 1], [(1,), (0,)]),  # one row that is too long has a batch of its own
        ([2] * 7, [(0, 1, 2, 3, 4, 5), (6,)]),
        ([], []),
    ],
)
def test_batches_hold_what_fits_with_its_padding(lengths: list[int], batches: list[tuple[int, ...]]) -> None:
    assert plan_rows([text(length) for length in lengths], max_tokens=12) == batches


def test_a_pair_as_long_as_the_context_is_judged_and_a_longer_one_refused() -> None:
    pair = {"input_ids": list(text(8).input_ids), "labels": list(text(8).labels)}
    assert eval_rows([pair], byte_tokenizer(), context=8, limit=4) == (text(8),)
    with pytest.raises(CollapseError, match="8 tokens, the model takes 7") as caught:
        eval_rows([pair], byte_tokenizer(), context=7, limit=4)
    assert (caught.value.code, caught.value.row) == ("eval_pair", 0)


def test_the_first_two_answers_to_each_prompt_are_judged_behind_it_those_of_no_token_left_out() -> None:
    said = {(0, 0): (7, 2), (0, 1): (8, 2), (0, 2): (9, 2), (1, 0): (), (1, 1): (6,)}
    samples = [Sample(prompt, index, ids, "", truncated=False, seed=0) for (prompt, index), ids in said.items()]
    assert frozen_rows(samples, [[3, 4, 5], [3]]) == [
        LabelledText((3, 4, 5, 7, 2), (-100, -100, -100, 7, 2)),
        LabelledText((3, 4, 5, 8, 2), (-100, -100, -100, 8, 2)),
        LabelledText((3, 6), (-100, 6)),
    ]


def test_no_more_pairs_than_the_limit_are_read() -> None:
    pairs = [{"input_ids": list(text(n).input_ids), "labels": list(text(n).labels)} for n in (3, 4, 5)]
    read = eval_rows(iter(pairs), byte_tokenizer(), context=None, limit=2)
    assert [len(row.input_ids) for row in read] == [3, 4]


def test_a_label_counts_where_a_token_stands_before_it() -> None:
    ids = [5, 6, 7]
    for labels in ([5, -100, -100], [-100, -100, -100]):
        with pytest.raises(CollapseError) as caught:
            eval_rows([{"input_ids": ids, "labels": labels}], byte_tokenizer(), context=None, limit=4)
        assert caught.value.code == "no_supervised_tokens"
    (row,) = eval_rows([{"input_ids": ids, "labels": [-100, -100, 7]}], byte_tokenizer(), context=None, limit=4)
    assert row.labels == (-100, -100, 7)
