"""Readers that the pages give for trainers which were never run here: what they hand over are the rows of the command.

The trainers' own words, read in their source, are the expectation; no trainer takes part.
"""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from sft_plugins.masking import PromptMasker, mask_dataset
from testkit.commands import chat_tokenizer, conversations, invoke, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
COUNT = 12


def masked() -> Dataset:
    return mask_dataset(Dataset.from_list(conversations(COUNT)), PromptMasker(chat_tokenizer())).dataset


def written(tmp_path: Path, to: str) -> Path:
    data = write_jsonl(tmp_path / "rows.jsonl", conversations(COUNT))
    chat_tokenizer().save_pretrained(tmp_path / "model")
    done = invoke("mask", data, "-m", tmp_path / "model", "--output", tmp_path / "out", "--to", to)
    assert done.exit_code == 0, done.output
    return tmp_path / "out" / "rows"


# --- verl: data.custom_cls --------------------------------------------------------------------------------------------


def verl_rows(files: Any, **config: Any) -> Any:
    reader = runpy.run_path(str(ROOT / "configs" / "verl_rows.py"))["MaskedRows"]
    options = {"pad_mode": "no_padding", "max_length": 1024, **config}
    return reader(parquet_files=files, tokenizer=None, config=options, processor=None, max_samples=-1)


def test_verls_reader_gives_what_its_own_data_set_gives_without_padding(tmp_path: Path) -> None:
    rows = verl_rows(str(written(tmp_path, "verl")))
    assert len(rows) == COUNT
    for given, row in zip((rows[i] for i in range(COUNT)), masked(), strict=True):
        assert set(given) == {"input_ids", "position_ids", "loss_mask"}
        assert all(value.dtype == torch.int64 for value in given.values())
        assert given["input_ids"].tolist() == row["input_ids"]
        assert given["position_ids"].tolist() == list(range(len(row["input_ids"])))
        # `sft_loss` rolls the mask by one: the loss at t is that of token t + 1, where the mask there is 1.
        trained = torch.roll(given["loss_mask"], -1)[:-1].bool()
        assert given["input_ids"][1:][trained].tolist() == [label for label in row["labels"] if label != -100]


def test_verls_reader_takes_files_as_well_as_folders_and_refuses_what_verl_would_cut(tmp_path: Path) -> None:
    folder = written(tmp_path, "verl")
    assert len(verl_rows([str(file) for file in folder.glob("*.parquet")])) == COUNT
    longest = max(map(len, masked()["input_ids"][:]))
    assert len(verl_rows(str(folder), max_length=longest)) == COUNT
    with pytest.raises(ValueError, match=f"a row has {longest} tokens, data.max_length={longest - 1}"):
        verl_rows(str(folder), max_length=longest - 1)
    with pytest.raises(ValueError, match=r"data\.pad_mode=right"):
        verl_rows(str(folder), pad_mode="right")


def test_the_lines_for_verl_are_one_on_page_file_and_terminal(tmp_path: Path) -> None:
    written(tmp_path, "verl")
    page = (ROOT / "docs" / "other-trainers.md").read_text(encoding="utf-8")
    texts = [page, (ROOT / "configs" / "verl_rows.py").read_text(), (tmp_path / "out" / "use.sh").read_text()]
    words = []
    for text in texts:
        command = re.search(r"torchrun (?:.*\\\n)*.*", text)
        assert command is not None
        words.append([word.partition("=")[0] for word in shlex.split(command[0].replace("\\\n", " "))])
    assert sorted(words[0]) == sorted(words[1]) == sorted(words[2])


# --- NeMo Automodel: labels shifted already ---------------------------------------------------------------------------


def test_nemos_reader_shifts_labels_once(tmp_path: Path) -> None:
    """At each place the label is the next token, where that is trained."""
    page = (ROOT / "docs" / "other-trainers.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", page.partition("## NeMo")[2], flags=re.S)
    assert block is not None
    names: dict[str, Any] = {}
    exec(compile(block[1], "other-trainers.md", "exec"), names)
    rows = names["masked_rows"](str(written(tmp_path, "parquet")), chat_tokenizer())
    for given, row in zip(rows, masked(), strict=True):
        assert given["input_ids"] == row["input_ids"][:-1]
        assert len(given["labels"]) == len(given["attention_mask"]) == len(given["input_ids"])
        wanted = [
            token if label != -100 else -100
            for token, label in zip(row["input_ids"][1:], row["labels"][1:], strict=True)
        ]
        assert given["labels"] == wanted
        assert given["___PAD_TOKEN_IDS___"]["input_ids"] == chat_tokenizer().pad_token_id


# --- Unsloth ----------------------------------------------------------------------------------------------------------


def test_the_script_for_unsloth_is_that_of_its_page(tmp_path: Path) -> None:
    rows = written(tmp_path, "unsloth")
    page = (ROOT / "docs" / "unsloth.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", page, flags=re.S)
    assert block is not None
    script = (rows.parent / "use.py").read_text()
    for path, name in ((rows, "masked/rows"), (tmp_path / "model", "./model")):
        script = script.replace(f"'{path}'", f'"{name}"')
    assert script == block[1]
