"""LLaMA-Factory trains rows that were masked here, in an environment of its own: what its data loader gives are those rows.

`make test-llamafactory` names its Python in SFT_PLUGINS_LLAMAFACTORY; elsewhere these tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from sft_plugins.masking import PromptMasker, mask_dataset
from testkit.commands import chat_tokenizer, conversations, invoke, write_jsonl
from testkit.patience import HANGS
from testkit.tiny_training import save_tiny_llama

PYTHON = os.environ.get("SFT_PLUGINS_LLAMAFACTORY")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="LLaMA-Factory has an environment of its own: make test-llamafactory"
)
ROOT = Path(__file__).resolve().parents[3]
COUNT = 24
ON_A_CPU = {"use_cpu": True, "bf16": False, "max_steps": 2, "save_strategy": "no", "gradient_accumulation_steps": 1}


def drive(jobs: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What LLaMA-Factory saw of each job."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    driver = Path(__file__).with_name("drive_llamafactory.py")
    done = subprocess.run(
        [str(PYTHON), str(driver), "jobs.json", "seen.json"], cwd=folder, env={**clean, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False, timeout=HANGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process for all that is looked at. The configuration is that of `configs/`, its data made by its command."""
    folder = tmp_path_factory.mktemp("desk")
    save_tiny_llama(folder / "model", chat_tokenizer(), hidden_size=32, intermediate_size=48, num_attention_heads=4)
    write_jsonl(folder / "conversations.jsonl", conversations(COUNT))
    text = (ROOT / "configs" / "llamafactory_lora.yaml").read_text(encoding="utf-8")
    command = re.search(r"sft-plugins (mask .*?)  ", text)
    assert command is not None
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = invoke(*command[1].split())
        packed = invoke(*command[1].replace("--output masked", "--output packed").split(), "--pack", 128)
    finally:
        os.chdir(before)
    assert done.exit_code == 0, done.output
    printed = yaml.safe_load((folder / "masked" / "use.yaml").read_text())
    config = yaml.safe_load(text)
    assert printed.keys() <= config.keys()  # what the command prints is part of the whole file
    config = {**config, **ON_A_CPU}
    jobs = [
        {"name": "config", "train": config},
        {"name": "printed", "train": {**config, **printed, "output_dir": "runs/printed"}},
    ]
    return {**drive(jobs, folder), "packed": packed, "folder": folder}


def wanted() -> list[list[list[int]]]:
    made = mask_dataset(Dataset.from_list(conversations(COUNT)), PromptMasker(chat_tokenizer())).dataset
    return sorted([ids, labels] for ids, labels in zip(made["input_ids"][:], made["labels"][:], strict=True))


@pytest.mark.parametrize("name", ["config", "printed"])
def test_rows_arrive_unchanged_in_the_data_loader_of_the_host(name: str, seen: dict[str, Any]) -> None:
    """From the ready configuration, and with the lines that the command prints put into it."""
    run = seen[name]
    assert "error" not in run, run
    assert sorted(row for batch in run["batches"] for row in batch) == wanted()
    assert run["keys"] == ["attention_mask", "input_ids", "labels"]
    assert run["collator"] == "SFTDataCollatorWith4DAttentionMask"


def test_the_loss_is_that_of_the_rows_alone_and_no_padding_carries_any(seen: dict[str, Any]) -> None:
    assert len(seen["config"]["losses"]) == COUNT / 2
    for loss, alone, outside in seen["config"]["losses"]:
        assert loss == pytest.approx(alone, rel=1e-5)
        assert outside == 0


def test_it_trains_and_leaves_an_adapter(seen: dict[str, Any]) -> None:
    assert seen["config"]["steps"] == 2
    assert (seen["folder"] / "runs" / "llamafactory_lora" / "adapter_model.safetensors").is_file()


def test_packed_rows_are_not_written_for_it(seen: dict[str, Any]) -> None:
    assert seen["packed"].exit_code == 2
    assert "LLaMA-Factory reads a packed row as one document" in seen["packed"].stderr
