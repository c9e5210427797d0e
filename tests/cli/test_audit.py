"""`sft-plugins audit`: every failure is counted under its code, whatever form rows come in; exit code 1 says there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sft_plugins.masking import PromptMasker, check_masks, mask_dataset
from sft_plugins.packing import pack_dataset
from testkit.commands import chat_tokenizer, conversations, invoke, write_jsonl


def audited(*arguments: object) -> tuple[int, dict[str, Any]]:
    done = invoke("audit", *arguments, "--json")
    return done.exit_code, json.loads(done.stdout)


def faulty(count: int = 300) -> list[dict[str, Any]]:
    """Rows with three kinds of fault in known places."""
    rows = conversations(count)
    for i in (3, 280):
        rows[i]["messages"][1]["content"] = ""
    rows[7]["messages"][0]["content"] = "<|im_start|>"
    rows[9]["messages"][1]["role"] = "asistant"
    return rows


# --- raw rows ---------------------------------------------------------------------------------------------------------


def test_every_failure_is_counted_by_code_with_its_rows(model: Path, tmp_path: Path) -> None:
    code, said = audited(write_jsonl(tmp_path / "rows.jsonl", faulty()), "--model", model)
    assert code == 1
    assert said["ok"] is False
    found = said["report"]["failures"]
    assert {name: (entry["count"], entry["first_rows"]) for name, entry in found.items()} == {
        "empty_response": (2, [3, 280]), "special_token_in_content": (1, [7]), "bad_schema": (1, [9]),
    }  # fmt: skip
    assert set(said["faults"]) == set(found)
    assert (said["report"]["rows_in"], said["report"]["rows_out"]) == (300, 296)
    assert said["data"] == {"path": str(tmp_path / "rows.jsonl"), "kind": "raw", "format": "JSON Lines", "notes": []}


def test_the_table_names_codes_counts_examples_and_what_to_do(model: Path, tmp_path: Path) -> None:
    done = invoke("audit", write_jsonl(tmp_path / "rows.jsonl", faulty()), "--model", model)
    assert done.exit_code == 1
    said = " ".join(done.stdout.replace("│", " ").split())
    assert "2 (rows #3, #280)" in said
    assert "unknown role 'asistant'" in said
    assert "empty_response: 2 rows. Remove those rows, or write the answer." in said


def test_faultless_rows_pass_and_the_report_is_that_of_masking(model: Path, tmp_path: Path) -> None:
    rows = conversations(20)
    code, said = audited(write_jsonl(tmp_path / "rows.jsonl", rows), "--model", model)
    assert (code, said["ok"], said["faults"]) == (0, True, [])
    wanted = mask_dataset(Dataset.from_list(rows), PromptMasker(chat_tokenizer())).report.to_dict()
    assert said["report"] == json.loads(json.dumps(wanted))
    done = invoke("audit", tmp_path / "rows.jsonl", "--model", model)
    assert "every row is masked exactly" in done.stdout


@pytest.mark.parametrize(
    ("options", "code", "faults"),
    [
        (["--max-length", "30"], 1, ["overflow"]),
        (["--max-length", "30", "--overflow", "drop"], 0, []),
        (["--max-length", "30", "--overflow", "keep_turns"], 0, []),
        (["--max-length", "1000"], 0, []),
        (["--limit", "3"], 0, []),
    ],
)
def test_long_rows_are_a_fault_unless_a_policy_was_chosen_for_them(
    options: list[str], code: int, faults: list[str], model: Path, tmp_path: Path
) -> None:
    got, said = audited(write_jsonl(tmp_path / "rows.jsonl", conversations(20)), "--model", model, *options)
    assert (got, said["faults"]) == (code, faults)
    if "drop" in options:
        assert said["report"]["failures"]["overflow"]["count"] > 0  # counted all the same
    if "--limit" in options:
        assert said["report"]["rows_in"] == 3


@pytest.mark.parametrize("overflow", ["drop", "truncate", "keep_turns"])
def test_a_row_without_an_answer_is_a_fault_whatever_becomes_of_long_rows(
    overflow: str, model: Path, tmp_path: Path
) -> None:
    """Both rows end as `no_supervised_tokens` under a cut; only what the limit did was asked for."""
    rows = conversations(3)
    long = {"messages": [{"role": "user", "content": "Why? " * 99}, *rows[0]["messages"][1:]]}
    options = ["--model", model, "--max-length", "90", "--overflow", overflow]
    asked = audited(write_jsonl(tmp_path / "long.jsonl", [*rows, long]), *options)
    assert (asked[0], asked[1]["faults"], asked[1]["report"]["dropped_rows"]) == (0, [], 1)
    unanswered = {"messages": rows[0]["messages"][:1]}
    code, said = audited(write_jsonl(tmp_path / "both.jsonl", [*rows, long, unanswered]), *options)
    assert (code, said["faults"]) == (1, ["no_supervised_tokens"])
    found = said["report"]["failures"]
    assert sum(one["count"] for one in found.values()) == 2
    assert sum(one["too_long"] for one in found.values()) == 1
    assert "no_supervised_tokens: 1 row. " in invoke("audit", tmp_path / "both.jsonl", *options).stdout


def test_special_tokens_in_content_may_be_allowed(model: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", faulty()[7:8])
    assert audited(rows, "--model", model)[0] == 1
    assert audited(rows, "--model", model, "--special-tokens-in-content", "allow")[0] == 0


# --- rows already tokenised -------------------------------------------------------------------------------------------


def masked_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = mask_dataset(
        Dataset.from_list(conversations(6)), PromptMasker(chat_tokenizer())
    ).dataset.to_list()
    return rows


def with_mask(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {"input_ids": row["input_ids"], name: [int(label != -100) for label in row["labels"]]}


@pytest.mark.parametrize("column", ["labels", "completion_mask", "assistant_masks"])
def test_masks_made_elsewhere_are_checked_in_every_column_they_come_in(
    column: str, model: Path, tmp_path: Path
) -> None:
    rows = masked_rows() if column == "labels" else [with_mask(row, column) for row in masked_rows()]
    code, said = audited(write_jsonl(tmp_path / "good.jsonl", rows), "--model", model)
    assert (code, said["data"]["kind"]) == (0, "tokenised")
    rows[2] = rows[2] | {column: rows[2][column][:-1]}
    rows[4] = rows[4] | {column: [-100 if column == "labels" else 0] * len(rows[4]["input_ids"])}
    code, said = audited(write_jsonl(tmp_path / "bad.jsonl", rows), "--model", model)
    assert code == 1
    assert {name: entry["first_rows"] for name, entry in said["report"]["failures"].items()} == {
        "length_mismatch": [2], "no_supervised_tokens": [4],
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["", "0123abcd", "sft_plugins-77/0123abcd"])
def test_saved_and_prepared_folders_are_checked(folder: str, model: Path, tmp_path: Path) -> None:
    """TRL's users save data sets; Axolotl saves below `dataset_prepared_path`, our plug-in one level further down."""
    rows = masked_rows()
    rows[1]["labels"][-1] = -100  # the stop token of the answer
    for row in rows:  # the columns that Axolotl adds
        row |= {
            "attention_mask": [1] * len(row["input_ids"]),
            "position_ids": [*range(len(row["input_ids"]))],
            "length": 1,
        }
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "prepared" / folder))
    code, said = audited(tmp_path / "prepared", "--model", model)
    assert code == 1
    assert said["report"]["failures"]["missing_stop"]["first_rows"] == [1]
    assert said["data"]["format"] == ("Axolotl prepared" if folder else "saved dataset")


def test_packed_rows_are_checked_document_by_document(model: Path, tmp_path: Path) -> None:
    dataset = Dataset.from_list(masked_rows())
    packed, _ = pack_dataset(dataset, 160)
    packed.save_to_disk(str(tmp_path / "good"))
    code, said = audited(tmp_path / "good", "--model", model)
    assert (code, said["report"]["rows_in"], said["report"]["rows_out"]) == (0, len(packed), 6)
    assert said["report"]["notes"][-1].startswith("rows are packed")

    def first_label(row: dict[str, Any]) -> dict[str, Any]:
        start = row["seq_lengths"][0]  # the second document's first token is predicted from the first document
        if len(row["seq_lengths"]) > 1:
            row["labels"][start] = row["input_ids"][start]
        return row

    packed.map(first_label).save_to_disk(str(tmp_path / "bad"))
    code, said = audited(tmp_path / "bad", "--model", model)
    assert code == 1
    several = [row for row, lengths in enumerate(packed["seq_lengths"]) if len(lengths) > 1]
    found = said["report"]["failures"]["first_label"]
    assert found["count"] == len(several) > 0
    assert (found["first_rows"], found["first_documents"]) == (several[:5], [1] * len(several[:5]))
    told = invoke("audit", tmp_path / "bad", "--model", model).stdout
    assert f"#{several[0]} document 2" in told
    assert f"first_label: {len(several)} document" in told


def test_the_audit_of_tokenised_rows_is_that_of_check_masks(model: Path, tmp_path: Path) -> None:
    rows = masked_rows()
    rows[0]["labels"][0] = rows[0]["input_ids"][0]
    _, said = audited(write_jsonl(tmp_path / "rows.jsonl", rows), "--model", model)
    assert said["report"] == json.loads(json.dumps(check_masks(rows, chat_tokenizer()).to_dict()))


# --- what cannot be audited -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "missing_file"),
        ('{"prompt": "a", "response": "b"}\n{"prompt"\n', "bad_jsonl"),
        ("", "no_rows"),
        ('{"question": "a", "answer": "b"}\n', "bad_schema"),
        ("\0\1\2\3", "bad_data"),
    ],
)
def test_unusable_data_is_exit_code_2_and_a_message(
    content: str | None, code: str, as_json: bool, model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    if content is not None:
        data.write_text(content)
    done = invoke("audit", data, "--model", model, *(["--json"] if as_json else []))
    assert done.exit_code == 2
    assert f"error [{code}]" in done.stderr
    assert "what to do: " in done.stderr
    assert "Traceback" not in done.output
    if as_json:
        assert json.loads(done.stdout)["error"]["code"] == code
    else:
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "code"), [("empty", "bad_model"), ("/nowhere", "missing_file"), ("a/b", "model_unreachable")]
)
def test_an_unusable_model_is_exit_code_2_and_a_message(name: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    model = tmp_path / name if name == "empty" else name
    done = invoke("audit", write_jsonl(tmp_path / "rows.jsonl", conversations(1)), "--model", model)
    assert done.exit_code == 2
    assert f"error [{code}]" in done.stderr


def test_quiet_leaves_the_exit_code_to_tell(model: Path, tmp_path: Path) -> None:
    done = invoke("audit", write_jsonl(tmp_path / "rows.jsonl", faulty()[:12]), "--model", model, "--quiet")
    assert (done.exit_code, done.output) == (1, "")


def test_columns_may_be_ignored_and_names_of_speakers_given(model: Path, tmp_path: Path) -> None:
    said = [{"role": "critic", "content": "Well?"}, {"role": "assistant", "content": "Yes."}]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": said, "context": "In Paris.", "id": 7}])
    options = ("--model", model, "--role", "critic=user")
    assert audited(rows, *options)[0] == 1
    code, found = audited(rows, *options, "--ignore-column", "context")
    assert (code, found["report"]["unread_columns"]) == (0, ["id"])
    assert audited(rows, "--model", model, "--role", "critic", "--ignore-column", "context")[0] == 2
