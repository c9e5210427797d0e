"""`sft-plugins pack`: the figures shown are those of the packed rows, and the rows saved are those that packing makes."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from sft_plugins.cli.ui.histogram import BINS, bar, bins, histogram
from sft_plugins.masking import PromptMasker, mask_dataset
from sft_plugins.packing import pack_dataset
from testkit.commands import chat_tokenizer, conversations, invoke, write_jsonl


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", conversations(40))


def masked() -> Dataset:
    return mask_dataset(Dataset.from_list(conversations(40)), PromptMasker(chat_tokenizer())).dataset


def packed(*arguments: object) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(invoke("pack", *arguments, "--json").stdout)
    return said


# --- the report -------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_rows_that_packing_makes(data: Path, model: Path) -> None:
    said = packed(
        data, "--model", model, "--max-length", "128", "--batch-size", "4", "--accumulation", "2", "--world", "2"
    )
    lengths = [len(ids) for ids in masked()["input_ids"]]
    rows = pack_dataset(masked(), 128, seed=0)[0]
    report = said["report"]
    assert report["rows"] == len(rows)
    assert report["tokens"] == sum(lengths)
    assert report["lower_bound"] == math.ceil(sum(lengths) / 128)
    assert math.isclose(report["fill"], sum(lengths) / (128 * len(rows)))
    assert report["padded_to_max_length"] == 128 * len(lengths)
    assert said["training"]["steps_before"] == math.ceil(math.ceil(40 / 8) / 2)
    assert said["training"]["steps_after"] == math.ceil(math.ceil(len(rows) / 8) / 2)
    assert sum(entry["documents"] for entry in said["lengths"]) == 40
    for entry in said["lengths"]:
        assert entry["documents"] == sum(entry["from"] <= length <= entry["to"] for length in lengths)


def test_the_table_says_fill_bound_steps_padding_and_lengths(data: Path, model: Path) -> None:
    done = invoke("pack", data, "--model", model, "--max-length", "128", "--batch-size", "4")
    report = pack_dataset(masked(), 128, seed=0)[1]
    assert done.exit_code == 0
    said = " ".join(done.stdout.split())
    assert f"{report.fill:.2%}; {report.tokens:,} tokens" in said
    assert f"no packing has fewer than {report.lower_bound} rows" in said
    assert f"10 → {math.ceil(report.rows / 4)}, at 4 × 1 × 1 = 4 rows each" in said
    assert f"{report.padded[4] / report.tokens:.2f}× the tokens, in batches of 4" in said
    assert "Tokens per document" in said
    assert "█" in said


@pytest.mark.parametrize("overflow", ["drop", "truncate", "keep_turns"])
def test_what_a_limit_costs_is_counted(overflow: str, data: Path, model: Path) -> None:
    limit = 40
    said = packed(data, "--model", model, "--max-length", limit, "--overflow", overflow)
    rows = masked().to_list()
    long = [row for row in rows if len(row["input_ids"]) > limit]
    assert 0 < len(long) < 40
    if overflow == "keep_turns":  # of one question and one answer nothing is left
        assert said["report"]["documents"] == 40 - len(long)
        assert sum(found["count"] for found in said["masking"]["failures"].values()) == len(long)
        return
    lost = said["report"]["lost"]
    assert sum(loss["rows"] for loss in lost.values()) == len(long)
    if overflow == "drop":
        assert lost["overflow"]["tokens"] == sum(len(row["input_ids"]) for row in long)
    assert said["report"]["tokens"] + sum(loss["tokens"] for loss in lost.values()) == sum(
        len(row["input_ids"]) for row in rows
    )


def test_long_rows_may_be_refused(data: Path, model: Path) -> None:
    done = invoke("pack", data, "--model", model, "--max-length", "40", "--overflow", "raise")
    assert done.exit_code == 2
    assert "error [overflow] (row " in done.stderr


def test_rows_that_cannot_be_masked_are_left_out_named_and_exit_code_1(model: Path, tmp_path: Path) -> None:
    rows = conversations(8)
    rows[5]["messages"][1]["content"] = ""
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    done = invoke("pack", data, "--model", model, "--max-length", "128", "--output", tmp_path / "out")
    assert done.exit_code == 1
    assert "empty_response: 1 row left out (rows 5)" in done.stdout
    assert "7 of 8 rows" in done.stdout
    assert sum(len(n) for n in Dataset.load_from_disk(str(tmp_path / "out"))["seq_lengths"]) == 7


def test_rows_already_tokenised_are_packed_with_their_own_masks(model: Path, tmp_path: Path) -> None:
    rows = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
        for row in masked()
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert invoke("pack", data, "--model", model, "--max-length", "128", "--output", tmp_path / "out").exit_code == 0
    assert Dataset.load_from_disk(str(tmp_path / "out")).to_list() == pack_dataset(masked(), 128, seed=0)[0].to_list()


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_saved_holds_the_rows_that_packing_makes(data: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "packed"
    said = packed(data, "--model", model, "--max-length", "128", "--seed", "3", "--output", out)
    assert said["output"] == str(out)
    assert Dataset.load_from_disk(str(out)).to_list() == pack_dataset(masked(), 128, seed=3)[0].to_list()
    assert [path.name for path in out.parent.iterdir()] == ["packed"]  # nothing half-written is left beside it


def test_a_folder_that_holds_something_is_refused_before_any_work(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    monkeypatch.setattr("sft_plugins.preflight.data.source.open_data", None)  # would fail if it were called
    done = invoke("pack", data, "--model", model, "--max-length", "128", "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "error [output_exists]" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_folder_that_cannot_be_written_is_refused(data: Path, model: Path) -> None:
    """Below a file nobody can write, root neither."""
    done = invoke("pack", data, "--model", model, "--max-length", "128", "--output", data / "out", "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["code"] == "unwritable"


def test_a_saving_that_fails_leaves_nothing_half_written(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Dataset, path: str) -> None:
        Path(path).mkdir()
        (Path(path) / "half").write_text("")
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(Dataset, "save_to_disk", fails)
    done = invoke("pack", data, "--model", model, "--max-length", "128", "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "No space left on device" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"out", "rows.jsonl"}


# --- what cannot be packed --------------------------------------------------------------------------------------------


def test_packed_rows_are_not_packed_again(model: Path, tmp_path: Path) -> None:
    pack_dataset(masked(), 128)[0].save_to_disk(str(tmp_path / "packed"))
    done = invoke("pack", tmp_path / "packed", "--model", model, "--max-length", "256")
    assert done.exit_code == 2
    assert "error [already_packed]" in done.stderr


def test_data_of_which_nothing_is_left_says_why(model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "response": ""}] * 3)
    done = invoke("pack", data, "--model", model, "--max-length", "128")
    assert done.exit_code == 2
    assert "no row is left: empty_response in 3 rows" in " ".join(done.stderr.split())


def test_a_limit_below_every_row_packs_nothing_and_says_so(data: Path, model: Path) -> None:
    done = invoke("pack", data, "--model", model, "--max-length", "2")
    assert "Traceback" not in done.output
    assert done.exit_code in (0, 2)


# --- the histogram ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=50), st.none() | st.integers(2, 10_000))
def test_bins_cover_every_length_once_and_are_few(lengths: list[int], limit: int | None) -> None:
    found = bins(lengths, limit=limit)
    assert len(found) <= BINS
    assert [count for *_, count in found] == [sum(low <= n <= high for n in lengths) for low, high, _ in found]
    assert sum(count for *_, count in found) == len(lengths)
    assert found[0][0] == 1
    assert all(left[1] + 1 == right[0] for left, right in pairwise(found))


def test_one_enormous_document_does_not_make_one_bar_of_all_others() -> None:
    found = bins([*range(1, 1001), 30_000], limit=2048)
    assert sum(count > 0 for low, _, count in found if low <= 1000) >= 5
    assert found[-1] == (found[-2][1] + 1, 30_000, 1)


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_bars_fit_their_terminal_and_are_as_long_as_their_counts(width: int) -> None:
    lengths = np.repeat([50, 150, 250], [8, 4, 1])
    text = histogram(lengths, Console(width=width), limit=200).plain
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert [line.endswith(("over the limit", "!")) for line in lines if "█" in line or "▏" in line] == [
        int(line.replace(",", "").split("–")[0]) > 200 for line in lines if "█" in line or "▏" in line
    ]
    drawn = [len(re.findall("█", line)) for line in lines]
    assert max(drawn) == drawn[next(i for i, line in enumerate(lines) if re.search(r"\s8\s", line))]


def test_a_bar_is_drawn_to_an_eighth_and_never_vanishes() -> None:
    assert bar(2.5) == "██▌"
    assert bar(0.001) == "▏"
    assert bar(0) == ""
    assert bar(2.4, ascii_only=True) == "##"
    assert bar(0.001, ascii_only=True) == "#"
