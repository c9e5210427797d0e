"""What a report says in words is what it holds in numbers."""

from __future__ import annotations

import pytest
from datasets import Dataset

from sft_plugins.packing import PackReport, pack_dataset


def report_of(*lengths: int, max_length: int) -> PackReport:
    rows = [{"input_ids": list(range(1, n + 1)), "labels": [-100, *range(2, n + 1)]} for n in lengths]
    return pack_dataset(Dataset.from_list(rows), max_length).report


def line(report: PackReport, name: str) -> tuple[str, str]:
    (found,) = ((value, note) for told, value, note in report._lines() if told == name)
    return found


def test_padding_is_told_in_tokens_and_as_a_multiple_of_the_packed_ones() -> None:
    """Eight documents in one batch of eight, each padded to 6: 48 tokens for 20, 2.4 times as many."""
    report = report_of(6, 2, 2, 2, 2, 2, 2, 2, max_length=10)
    assert sorted(report.padded) == [1, 2, 4, 8, 16, 32, 64]
    assert (report.tokens, report.padded[1], report.padded[8], report.padded[64]) == (20, 20, 48, 48)
    assert line(report, "padded, batches of 8") == ("2.40×", "48 tokens, each batch to its longest")
    assert report.padded_to_max_length == 80


def test_rows_and_fill_are_told_beside_the_lower_bound() -> None:
    """Three documents of 6 fit no row of 10 together: three rows, where their 18 tokens could fill two."""
    report = report_of(6, 6, 6, max_length=10)
    assert (report.rows, report.lower_bound, report.rows_above_bound, report.fill) == (3, 2, 1, pytest.approx(0.6))
    assert line(report, "lower bound") == ("2", "⌈tokens / max_length⌉; 1 above (50.000%)")
    assert line(report, "fill") == ("60.00%", "18 tokens")
    assert line(report, "supervised") == ("83.33%", "15 tokens carry loss")
    assert line(report, "packed rows") == ("3", "1.0 documents each")
    assert line(report, "documents") == ("3", "of 3 rows; the longest has 6 tokens")
