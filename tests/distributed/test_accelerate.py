"""The accelerate files of `configs/`: what `accelerate launch` makes of them on the CPU, and that DDP and FSDP2 train alike.

FSDP2 runs accelerate's and transformers' own code over gloo; only the check that keeps it to GPUs is turned
(`worker_script.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the script trains with TRL")

import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from testkit.tokenizers import build_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WORKER = Path(__file__).with_name("worker_script.py")
ANSWERS = ["The answer is four.", "It is 21 degrees.", "Fine, thanks."]
TYPES = {"accelerate_ddp.yaml": "MULTI_GPU", "accelerate_fsdp2.yaml": "FSDP", "accelerate_zero3.yaml": "DEEPSPEED"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model and rows, as options of the script."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = build_tokenizer("bytelevel", eos="<|im_end|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": ANSWERS[i % 3]}]}
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "rows.jsonl"),
        "--steps",
        "3",
        "--max-length",
        "64",
    ]


def accelerate(config: str, folder: Path, environment: dict[str, str], *arguments: str) -> list[dict[str, Any]]:
    folder.mkdir(parents=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    script = [str(CONFIGS / "trl_packing.py"), "--output", str(folder / "out")]
    worker = [str(WORKER), str(folder), *arguments[:-1], *script, *json.loads(arguments[-1])]
    done = subprocess.run(
        [*launch, "--main_process_port", "0", *worker],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert (folder / "out" / "adapter_model.safetensors").is_file()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_the_packing_script_trains_alike_under_ddp_and_fsdp2(
    inputs: list[str], tmp_path: Path, cpu_environment: dict[str, str]
) -> None:
    """Loss and gradient norm of three steps, every parameter sharded in one run and none in the other."""
    ddp = accelerate("accelerate_ddp.yaml", tmp_path / "ddp", cpu_environment, json.dumps(inputs))
    fsdp = accelerate("accelerate_fsdp2.yaml", tmp_path / "fsdp", cpu_environment, "--shard", json.dumps(inputs))
    for rank in ddp:
        assert (rank["world"], rank["wrapped"], rank["sharded"]) == (2, "DistributedDataParallel", 0)
    for rank in fsdp:
        assert (rank["world"], rank["wrapped"]) == (2, "FSDPPeftModelForCausalLM")
        assert rank["sharded"] == rank["parameters"] > 20
    assert len(ddp[0]["logged"]) == 3
    saved = [load_file(tmp_path / name / "out" / "adapter_model.safetensors") for name in ("ddp", "fsdp")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.allclose(saved[0][name], saved[1][name], atol=1e-6) for name in saved[0])
    for a, b in zip(ddp[0]["logged"], fsdp[0]["logged"], strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_the_file_and_knows_every_option(name: str) -> None:
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(CONFIGS / name))
    assert config.distributed_type.value == TYPES[name]
    assert (config.num_processes, config.num_machines) == (2, 1)
    known = {action.dest for action in launch_command_parser()._actions}
    text = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    assert set(text.get("fsdp_config", {})) | set(text.get("deepspeed_config", {})) <= known | {"fsdp_version"}


def test_every_accelerate_file_is_listed_here() -> None:
    assert {path.name for path in CONFIGS.glob("accelerate_*.yaml")} == set(TYPES)


def test_what_was_never_run_says_so_in_its_file() -> None:
    assert "NEVER RUN" in (CONFIGS / "accelerate_zero3.yaml").read_text(encoding="utf-8")
