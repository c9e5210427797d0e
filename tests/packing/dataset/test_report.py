"""The report on packed rows, and what it says of training."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from sft_plugins.packing import report as report_module
from sft_plugins.packing.dataset import pack_dataset
from sft_plugins.packing.report import PackReport, expected_padding
from testkit.documents import document, halves

# ---- The report ----


def report_of(*lengths: int, capacity: int = 10) -> PackReport:
    return pack_dataset(Dataset.from_list(halves(*lengths)), capacity).report


def test_the_report_counts_rows_fill_and_bound() -> None:
    report = report_of(6, 6, 6, 4)
    assert (report.documents, report.rows, report.lower_bound, report.rows_above_bound) == (4, 3, 3, 0)
    assert (report.tokens, report.supervised_tokens, report.longest) == (22, 11, 6)
    assert (report.fill, report.supervised_share) == (22 / 30, 0.5)
    assert report.padded_to_max_length == 40


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from([1, 2, 4]))
def test_padding_cost_is_the_mean_over_all_orders(lengths: list[int], batch: int) -> None:
    def cost(order: tuple[int, ...]) -> int:
        batches = [order[i : i + batch] for i in range(0, len(order), batch)]
        return sum(len(part) * max(part) for part in batches)

    orders = [cost(order) for order in permutations(lengths)]
    values, counts = np.unique(lengths, return_counts=True)
    assert expected_padding(values, counts)[batch] == pytest.approx(sum(orders) / len(orders), abs=0.5001)


def test_the_report_says_what_changes_for_training() -> None:
    """Steps as transformers.Trainer counts them, worked by hand: 100 documents of 5 tokens, two to a row."""
    report = report_of(*[5] * 100)
    change = report.training(4, gradient_accumulation_steps=2, world_size=2)
    assert (change.rows_per_step, change.steps_before, change.steps_after) == (16, 7, 4)  # ⌈⌈100/8⌉/2⌉, ⌈⌈50/8⌉/2⌉
    assert (change.documents_per_step_before, change.documents_per_step_after) == (16, 32)
    assert (change.tokens_per_step_before, change.tokens_per_step_after) == (80, 160)
    assert change.rows_per_step_for_same_documents == 8
    assert "one epoch goes from 7 to 4 steps, each with 16 → 32 documents and 80 → 160 tokens" in str(change)
    assert "take 8 packed rows per step" in str(change)


def test_steps_are_those_of_the_trainer(tmp_path: Path) -> None:
    class Model(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": super().forward(x[:, None]).mean()}

    change = report_of(*[5] * 101).training(4, gradient_accumulation_steps=3)
    for rows, steps in ((101, change.steps_before), (51, change.steps_after)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=3,
            num_train_epochs=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(Model(1, 1), arguments, train_dataset=[{"x": 0.0}] * rows)
        trainer.train()
        assert trainer.state.global_step == steps


def test_the_report_is_plain_data() -> None:
    rows = [*halves(3, 4, 12), document(11, 3, prompt=10)]
    _, report = pack_dataset(Dataset.from_list(rows), 8, overflow="truncate")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["lost"]["truncated"] == {"rows": 1, "tokens": 4, "supervised_tokens": 4, "first_rows": [2]}
    assert data["lost"]["truncated_to_prompt"]["rows"] == 1
    assert (data["documents"], data["rows"], data["lower_bound"], data["fill"]) == (3, 2, 2, 15 / 16)


def test_the_printed_report_names_every_loss_and_the_change_for_training() -> None:
    rows = [*halves(3, 4, 12), document(11, 3, prompt=10), document(2, 4, prompt=2)]
    _, report = pack_dataset(Dataset.from_list(rows), 8, overflow="truncate", unsupervised="drop")
    text = str(report)
    for words in (
        "documents",
        "lower bound",
        "fill",
        "93.75%",
        "truncated",
        "cut at the end",
        "rows per optimizer step",
    ):
        assert words in text
    assert set(report.lost) == {"truncated", "truncated_to_prompt", "no_supervised_tokens"} < set(report_module.LOSSES)
