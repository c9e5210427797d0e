"""`sft-plugins mask`: what each trainer is given are the rows that masking makes, whole or not at all, and a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_from_disk

from sft_plugins.integrations.layouts import LAYOUTS, writing
from sft_plugins.masking import PromptMasker, mask_dataset
from sft_plugins.packing import pack_dataset
from sft_plugins.preflight.data import masked as shards
from testkit.commands import chat_tokenizer, conversations, invoke, write_jsonl

COUNT = 40


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", conversations(COUNT))


def wanted() -> Dataset:
    return mask_dataset(Dataset.from_list(conversations(COUNT)), PromptMasker(chat_tokenizer())).dataset


def written(folder: Path) -> dict[str, list[Any]]:
    """The columns of the rows in `folder`, read by the libraries that trainers read them with."""
    if list((folder / "rows").glob("*.parquet")):
        return pq.read_table(folder / "rows").to_pydict()
    return load_from_disk(str(folder / "rows")).to_dict()


def run(data: Path, model: Path, output: Path, *more: object) -> dict[str, Any]:
    done = invoke("mask", data, "--model", model, "--output", output, "--json", *more)
    assert done.exit_code == 0, done.output
    said: dict[str, Any] = json.loads(done.stdout)
    return said


# --- the rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", list(LAYOUTS))
def test_each_trainer_gets_the_rows_that_masking_makes(
    to: str, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In files of some rows each, as many rows have."""
    monkeypatch.setattr(writing, "BATCH_ROWS", 7)
    monkeypatch.setattr(writing, "PART_TOKENS", 400)
    said = run(data, model, tmp_path / "out", "--to", to)
    rows = wanted()
    columns = written(tmp_path / "out")
    ids, labels = rows["input_ids"][:], rows["labels"][:]
    every = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": [[1] * len(row) for row in ids],
        "loss_mask": [[int(label != -100) for label in row] for row in labels],
        "position_ids": [list(range(len(row))) for row in ids],
        "lengths": [len(row) for row in ids],
    }
    assert columns == {name: every[name] for name in LAYOUTS[to].columns}
    assert len(said["files"]) > 2
    assert sum(file["rows"] for file in said["files"]) == said["rows"] == COUNT
    assert said["tokens"] == sum(map(len, ids))
    assert said["supervised_tokens"] == sum(map(sum, every["loss_mask"]))
    assert said["longest"] == max(map(len, ids))


@pytest.mark.parametrize("to", [name for name, layout in LAYOUTS.items() if layout.packed])
def test_packed_rows_are_those_that_packing_makes(to: str, data: Path, model: Path, tmp_path: Path) -> None:
    run(data, model, tmp_path / "out", "--to", to, "--pack", 128, "--seed", 3)
    columns = written(tmp_path / "out")
    rows = pack_dataset(wanted(), 128, seed=3).dataset
    assert {name: columns[name] for name in rows.column_names} == rows.to_dict()
    assert "attention_mask" not in columns
    assert columns.get("lengths", [len(row) for row in columns["input_ids"]]) == [
        len(row) for row in rows["input_ids"][:]
    ]


@pytest.mark.parametrize("to", [name for name, layout in LAYOUTS.items() if not layout.packed])
def test_rows_are_not_packed_for_a_trainer_that_would_mix_their_documents(
    to: str, data: Path, model: Path, tmp_path: Path
) -> None:
    done = invoke("mask", data, "--model", model, "--output", tmp_path / "out", "--to", to, "--pack", 128)
    assert done.exit_code == 2
    assert "error [bad_option]" in done.stderr
    assert "rows can be packed for trl, swift, parquet" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overflow", ["drop", "keep_turns"])
def test_rows_longer_than_a_packed_row_are_what_overflow_says(
    overflow: str, model: Path, data: Path, tmp_path: Path
) -> None:
    said = run(data, model, tmp_path / "out", "--pack", 40, "--overflow", overflow)
    short = [row for row in wanted()["input_ids"][:] if len(row) <= 40]
    assert 0 < len(short) < COUNT
    assert said["tokens"] == sum(map(len, short))
    assert said["report"]["dropped_rows"] == COUNT - len(short)


def test_a_limit_beyond_the_packed_row_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    done = invoke("mask", data, "--model", model, "--output", tmp_path / "o", "--pack", 64, "--max-length", 65)
    assert done.exit_code == 2
    assert "--max-length 65 lets through rows that --pack 64 has no room for" in done.stderr


def test_rows_that_cannot_be_masked_are_left_out_named_and_exit_code_1(model: Path, tmp_path: Path) -> None:
    rows = conversations(8)
    rows[5]["messages"][1]["content"] = ""
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    done = invoke("mask", data, "--model", model, "--output", tmp_path / "out")
    assert done.exit_code == 1
    assert "(rows #5)" in done.stdout
    assert len(written(tmp_path / "out")["input_ids"]) == 7


# --- what stands beside them ------------------------------------------------------------------------------------------


def test_the_manifest_says_what_the_rows_are_for_and_how_they_were_made(
    data: Path, model: Path, tmp_path: Path
) -> None:
    said = run(data, model, tmp_path / "a", "--train-on", "last", "--role", "critic=user")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert {name: said[name] for name in manifest} == manifest
    assert manifest["options"]["train_on"] == "last"
    assert manifest["options"]["roles"] == {"critic": "user"}
    assert manifest["tokenizer"]["vocabulary"] == len(chat_tokenizer())
    assert manifest["report"]["rows_out"] == manifest["rows"] == COUNT
    assert manifest["versions"]["transformers"]

    other = chat_tokenizer().from_pretrained(model)
    other.chat_template = other.chat_template + "{# another #}"
    other.save_pretrained(tmp_path / "other")
    run(data, tmp_path / "other", tmp_path / "b")
    second = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert second["tokenizer"]["chat_template_sha256"] != manifest["tokenizer"]["chat_template_sha256"]
    assert second["tokenizer"]["sha256"] == manifest["tokenizer"]["sha256"]


@pytest.mark.parametrize("to", list(LAYOUTS))
def test_the_lines_of_configuration_name_rows_and_model_wherever_the_trainer_is_started(
    to: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_tokenizer().save_pretrained(tmp_path / "it's a model")
    monkeypatch.chdir(tmp_path)
    done = invoke("mask", "rows.jsonl", "--model", "it's a model", "--output", "out put", "--to", to)
    assert done.exit_code == 0, done.output
    lines = Path("out put", LAYOUTS[to].file).read_text()
    assert lines.strip() in done.stdout
    assert str(tmp_path / "out put" / "rows") in lines
    if LAYOUTS[to].file.endswith(".py"):
        compile(lines, "use.py", "exec")
    elif LAYOUTS[to].file.endswith(".yaml"):
        import yaml

        read = yaml.safe_load(lines)
        assert read["tokenized_path"] == str(tmp_path / "out put" / "rows")
        assert read["model_name_or_path"] == str(tmp_path / "it's a model")
    else:
        import shlex

        assert str(tmp_path / "it's a model") in lines.replace("'\"'\"'", "'")
        assert any(str(tmp_path / "out put" / "rows") in word for word in shlex.split(lines, comments=True))


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
    assert "error [nothing_left]" in invoke(*arguments, "--pack", 4).stderr
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


def test_packed_rows_and_data_of_which_nothing_is_left_are_refused(model: Path, tmp_path: Path) -> None:
    pack_dataset(wanted(), 128)[0].save_to_disk(str(tmp_path / "packed"))
    done = invoke("mask", tmp_path / "packed", "--model", model, "--output", tmp_path / "out")
    assert (done.exit_code, "error [already_packed]" in done.stderr) == (2, True)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "response": ""}])
    done = invoke("mask", data, "--model", model, "--output", tmp_path / "out")
    assert (done.exit_code, "error [nothing_left]" in done.stderr) == (2, True)
