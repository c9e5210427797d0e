"""`sft-plugins mask`: what each trainer is given are the rows that masking makes, and what stands beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from sft_plugins.integrations.layouts import LAYOUTS, writing
from sft_plugins.masking import PromptMasker, mask_dataset
from sft_plugins.packing import pack_dataset
from testkit.commands import chat_tokenizer, conversations, invoke, write_jsonl
from testkit.written_rows import COUNT, run, written


def wanted() -> Dataset:
    return mask_dataset(Dataset.from_list(conversations(COUNT)), PromptMasker(chat_tokenizer())).dataset


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


def test_packed_rows_and_data_of_which_nothing_is_left_are_refused(model: Path, tmp_path: Path) -> None:
    pack_dataset(wanted(), 128)[0].save_to_disk(str(tmp_path / "packed"))
    done = invoke("mask", tmp_path / "packed", "--model", model, "--output", tmp_path / "out")
    assert (done.exit_code, "error [already_packed]" in done.stderr) == (2, True)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "response": ""}])
    done = invoke("mask", data, "--model", model, "--output", tmp_path / "out")
    assert (done.exit_code, "error [empty_dataset]" in done.stderr) == (2, True)
