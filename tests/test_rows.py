"""The rules of a tokenised row, checked for many rows in one pass: equal to a look at each row by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_plugins._rows import RowRules, first_fault, integers
from sft_plugins.errors import MaskingError, PackingError

RULES = RowRules(vocabulary_size=9, bos_token_id=1, stop_token_ids=frozenset({2}))


def code_of(ids: list[int], labels: list[int]) -> str | None:
    """The slow, obviously right form."""
    trained = [label != -100 for label in labels]
    if any(not 0 <= token < 9 for token in ids):
        return "id_out_of_range"
    if any(label not in (-100, token) for token, label in zip(ids, labels, strict=True)):
        return "label_mismatch"
    if not any(trained):
        return "no_supervised_tokens"
    if trained[0]:
        return "first_label"
    if ids[:2] == [1, 1]:
        return "double_bos"
    lasts = [i for i in range(len(ids)) if trained[i] and (i + 1 == len(ids) or not trained[i + 1])]
    return "missing_stop" if any(ids[i] != 2 for i in lasts) else None


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    ids = draw(st.lists(st.sampled_from([1, 2, 2, 2, 5, 9]), max_size=5))
    labels = [draw(st.sampled_from([-100, -100, token, token, 3])) for token in ids]
    return ids, labels


@settings(max_examples=300, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=6))
def test_the_first_bad_row_is_found_with_the_first_rule_it_breaks(batch: list[tuple[list[int], list[int]]]) -> None:
    expected = next(((row, code) for row, (ids, labels) in enumerate(batch) if (code := code_of(ids, labels))), None)
    ids, labels = (np.array([x for row in batch for x in row[part]], np.int64) for part in (0, 1))
    found = first_fault(ids, labels, np.array([len(row[0]) for row in batch]), RULES, PackingError)
    assert (found and (found.row, found.code)) == expected
    assert found is None or type(found) is PackingError


@pytest.mark.parametrize("value", [[1, 0], np.array([1, 0], np.uint64), np.array([True, False]), []])
def test_integers_keep_a_type_that_joins_with_others(value: Any) -> None:
    assert (
        np.concatenate([integers(value, "mask", MaskingError, booleans=True), np.ones(1, np.int32)]).dtype == np.int64
    )


@pytest.mark.parametrize("value", [None, [[1], [1, 2]], [1.0], [True], "1 2", [[1]]])
def test_what_is_no_flat_list_of_integers_is_refused(value: Any) -> None:
    with pytest.raises(MaskingError, match="input_ids must be a flat list of integers") as caught:
        integers(value, "input_ids", MaskingError)
    assert caught.value.code == "bad_schema"
