"""`sft-plugins mask`: rows are written whole or not at all, a run that was interrupted goes on, nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_plugins.masking import PromptMasker
from sft_plugins.preflight.data import masked as shards
from testkit.commands import chat_tokenizer, conversations, invoke, write_jsonl
from testkit.written_rows import COUNT, run, written

# --- interrupted runs and full disks ----------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_BATCH", 5)
    monkeypatch.setattr(shards, "SHARD_ROWS", 10)


def stop_at(row: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[int]:
    """Raise when the batch that holds `row` is masked; gives the numbers of batches masked, counted."""
    encode, seen = PromptMasker.encode_batch, [0]

    def stops(self: PromptMasker, examples: Any) -> Any:
        batch = list(examples)
        seen[0] += len(batch)
        if seen[0] > row:
            raise error
        return encode(self, batch)

    monkeypatch.setattr(PromptMasker, "encode_batch", stops)
    return seen


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("count", [COUNT, COUNT - 1])  # whole shards, and a last one that is not full
def test_an_interrupted_run_goes_on_and_comes_to_the_same(
    count: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = conversations(count)
    rows[3]["messages"][1]["content"] = ""  # counted again on the way past it
    rows[27]["colour"] = "red"
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    arguments = ("mask", data, "--model", model, "--json", "--output")
    straight = json.loads(invoke(*arguments, tmp_path / "straight").stdout)
    with monkeypatch.context() as patch:
        stop_at(26, patch, KeyboardInterrupt())
        done = invoke(*arguments, tmp_path / "out")
        assert done.exit_code == 130
        assert not (tmp_path / "out" / "rows").exists()
    unfinished = tmp_path / ".out.unfinished"
    assert sorted(file.name for file in unfinished.iterdir()) == [
        "job.json",
        "masked-00000.arrow",
        "masked-00001.arrow",
    ]
    (unfinished / ".masked-00002.arrow.0123").write_bytes(b"half")  # as a killed process leaves it
    with monkeypatch.context() as patch:
        seen = stop_at(10_000, patch, AssertionError())
        done = invoke(*arguments, tmp_path / "out")
    assert done.exit_code == 1  # of the empty answer
    said = json.loads(done.stdout)
    assert seen == [count - 20]  # nothing twice
    assert said["report"] == straight["report"]
    assert said["report"]["rows_in"] == count
    assert written(tmp_path / "out") == written(tmp_path / "straight")
    assert not unfinished.exists()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", ["data", "option", "template"])
def test_what_an_interrupted_run_left_serves_no_other_job(
    change: str, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(26, patch, KeyboardInterrupt())
        assert invoke("mask", data, "--model", model, "--output", tmp_path / "out").exit_code == 130
    more: list[str] = []
    if change == "data":
        write_jsonl(data, conversations(COUNT + 1))
    elif change == "option":
        more = ["--train-on", "last"]
    else:
        tokenizer = chat_tokenizer().from_pretrained(model)
        tokenizer.chat_template += "{# another #}"
        model = tmp_path / "other"
        tokenizer.save_pretrained(model)
    done = invoke("mask", data, "--model", model, "--output", tmp_path / "out", *more)
    assert done.exit_code == 2
    assert "error [unfinished_output]" in done.stderr
    named = "data" if change == "data" else "tokenizer, template or option"
    assert f"another {named}." in done.stderr
    assert (tmp_path / ".out.unfinished" / "masked-00001.arrow").is_file()  # not thrown away either


def test_a_run_that_kept_no_row_stands_in_no_other_jobs_way(data: Path, model: Path, tmp_path: Path) -> None:
    """All rows too long, then a line that cannot be read; and each time the same folder with what was mended."""
    arguments = ("mask", data, "--model", model, "--output", tmp_path / "out")
    assert "error [empty_dataset]" in invoke(*arguments, "--pack", 4).stderr
    text = data.read_text()
    data.write_text(text + "{")
    assert "error [bad_jsonl]" in invoke(*arguments).stderr
    data.write_text(text)
    assert invoke(*arguments, "--pack", 128).exit_code == 0
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out", "rows.jsonl"]


@pytest.mark.parametrize("to", ["trl", "parquet"])
def test_a_full_disk_while_rows_are_written_leaves_nothing_half_and_masking_is_kept(
    to: str, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pa.ipc, "new_stream", full)
        patch.setattr(pq, "ParquetWriter", full)
        done = invoke("mask", data, "--model", model, "--output", tmp_path / "out", "--to", to)
        assert done.exit_code == 2
        assert "error [unwritable]" in done.stderr
        assert "No space left on device" in done.stderr
        assert "goes on from what is written" in done.stderr
    assert sorted(item.name for item in tmp_path.iterdir()) == [".out.unfinished", "out", "rows.jsonl"]
    assert list((tmp_path / "out").iterdir()) == []
    with monkeypatch.context() as patch:
        stop_at(-1, patch, AssertionError("masked twice"))
        assert run(data, model, tmp_path / "out", "--to", to)["rows"] == COUNT


def test_a_full_disk_while_rows_are_masked_says_how_it_goes_on(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(-1, monkeypatch, OSError(28, "No space left on device"))
    done = invoke("mask", data, "--model", model, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "masked-00000.arrow: rows cannot be written: No space left on device" in done.stderr
    assert "TMPDIR" not in done.stderr


# --- bad input --------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(data: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    done = invoke("mask", data, "--model", model, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "error [output_exists]" in done.stderr
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_link_to_a_folder_is_followed_and_the_folder_that_one_is_in_is_refused(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is replaced as a whole: whoever stands in it would be left in a folder that is gone."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    run(data, model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(written(tmp_path / "real")["input_ids"]) == COUNT
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = invoke("mask", data, "--model", model, "--output", ".")
    assert (done.exit_code, "is the folder that you are in" in done.stderr) == (2, True)
