"""`difference` sees every way in which a batch may differ from the rows that it should hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sft_plugins.integrations._arrival import difference

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [8, 9], "labels": [-100, 9]},
    {"input_ids": [3, 4, 2, 2], "labels": [-100, -100, 2, 2]},
]
FLAT = {name: torch.tensor([[entry for row in ROWS for entry in row[name]]]) for name in ROWS[0]}


def padded() -> dict[str, torch.Tensor]:
    """To a width of five, so that every row has padding."""
    fill = {"input_ids": 2, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [value] * (5 - len(row[name])) for row in ROWS]) for name, value in fill.items()
    }
    mask = [[1] * len(row["input_ids"]) + [0] * (5 - len(row["input_ids"])) for row in ROWS]
    return {**batch, "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("batch", [padded(), FLAT], ids=["padded", "flat"])
def test_a_batch_of_the_rows_has_no_difference(batch: dict[str, Any]) -> None:
    assert difference(batch, ROWS) is None


@pytest.mark.parametrize("name", ["input_ids", "labels"])
@pytest.mark.parametrize("flat", [False, True])
def test_every_single_entry_counts(name: str, flat: bool) -> None:
    """Each entry of each row, and each label on padding; what stands for ids on padding does not matter."""
    batch = FLAT if flat else padded()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    for place in range(batch[name].numel()):
        changed = batch[name].clone()
        changed.view(-1)[place] += 1
        found = difference({**batch, name: changed}, ROWS)
        if not mask.view(-1)[place] and name == "input_ids":
            assert found is None
        else:
            assert found is not None
            assert ("padding carries loss" if not mask.view(-1)[place] else f"1 entries of `{name}` differ") in found


def test_other_orders_and_lengths_are_differences() -> None:
    batch = padded()
    assert difference({name: values.flip(0) for name, values in batch.items()}, ROWS) is not None
    without_mask = {**batch, "attention_mask": torch.ones(3, 5)}
    assert difference(without_mask, ROWS) == "`input_ids` has 15 entries for 9"
    # The same entries, cut into rows elsewhere: 5 6 | 7 8 9 | 3 4 2 2
    cut = {
        "input_ids": torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0], [3, 4, 2, 2]]),
        "labels": torch.tensor([[-100, 6, -100, -100], [7, -100, 9, -100], [-100, -100, 2, 2]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
    }
    assert difference(cut, ROWS) == "rows of `input_ids` have other lengths"
