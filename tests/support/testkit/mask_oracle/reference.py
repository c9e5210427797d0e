"""The reference: one row per turn, the prompt as generation gets it and the response behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from testkit.mask_oracle.content import trainable
from testkit.mask_oracle.lost import variants
from testkit.mask_oracle.template import IGNORE
from testkit.mask_oracle.turn import continuation, tokenisations, turn


@dataclass
class Row:
    """The two lists of a masked row; mutable, so that tests can break it."""

    input_ids: list[int]
    labels: list[int]


def reference_rows(tokenizer: Any, row: dict[str, Any], *, stop_ids: set[int], train_on: str = "all") -> list[Row]:
    """The slowest correct masking: prompt and response of every turn tokenised apart and joined, a row for each turn.

    The first of the row's forms in which every turn can be exact.

    Raises:
        ValueError: where a turn cannot be exact, in any form.
    """
    reason = ValueError("the row has no form")
    for form in variants(row):
        try:
            return _reference_rows(tokenizer, form, stop_ids=stop_ids, train_on=train_on)
        except ValueError as error:
            reason = error
    raise reason


def _reference_rows(tokenizer: Any, row: dict[str, Any], *, stop_ids: set[int], train_on: str) -> list[Row]:
    rows = []
    for k in trainable(row["messages"], train_on):
        expected = turn(tokenizer, row, k, stop_ids)
        if expected.codes:
            raise ValueError(expected.why)
        text = expected.responses[0]
        options = tokenisations(tokenizer, text)
        fitting = [ids for ids in options if continuation(tokenizer, expected.prompt_ids, ids) == text]
        if not fitting:
            raise ValueError(f"turn {k}: {text!r} does not survive the tokenizer")
        before = list(expected.prompt_ids)
        rows.append(Row([*before, *fitting[0]], [IGNORE] * len(before) + list(fitting[0])))
    return rows
