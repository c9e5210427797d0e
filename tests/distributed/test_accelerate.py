"""The accelerate files of `configs/`: what `accelerate launch` makes of them on the CPU, and that DDP, FSDP2 and DeepSpeed
train alike.

FSDP2 and DeepSpeed run accelerate's and transformers' own code over gloo; only the check that keeps them to GPUs is turned
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

from testkit.commands import write_jsonl
from testkit.optional import needs_deepspeed
from testkit.patience import HANGS
from testkit.tiny_training import exchanges, save_tiny_llama

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WORKER = Path(__file__).with_name("worker_script.py")
TYPES = {"accelerate_ddp.yaml": "MULTI_GPU", "accelerate_fsdp2.yaml": "FSDP", "accelerate_zero3.yaml": "DEEPSPEED"}
Ranks = list[dict[str, Any]]
Trained = tuple[Ranks, dict[str, torch.Tensor]]
"""What each rank wrote down, and the adapter."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model and rows, as options of the script."""
    folder = tmp_path_factory.mktemp("inputs")
    model = save_tiny_llama(folder / "model", initializer_range=0.4)
    data = write_jsonl(folder / "rows.jsonl", exchanges(40))
    return ["--model", str(model), "--data", str(data), "--steps", "3", "--max-length", "64"]


def accelerate(
    config: str, folder: Path, environment: dict[str, str], inputs: list[str], *options: str, shard: bool = True
) -> Ranks:
    """`accelerate launch` of the packing script with one of our files; what each rank wrote down."""
    folder.mkdir(parents=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *options]
    script = [str(CONFIGS / "trl_packing.py"), "--output", str(folder / "out"), *inputs]
    worker = [str(WORKER), str(folder), *(["--shard"] if shard else []), *script]
    done = subprocess.run(
        [*launch, "--main_process_port", "0", *worker],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=HANGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def ddp(inputs: list[str], tmp_path_factory: pytest.TempPathFactory, cpu_environment: dict[str, str]) -> Trained:
    folder = tmp_path_factory.mktemp("accelerate") / "ddp"
    ranks = accelerate("accelerate_ddp.yaml", folder, cpu_environment, inputs, shard=False)
    for rank in ranks:
        assert (rank["world"], rank["wrapped"], rank["sharded"]) == (2, "DistributedDataParallel", 0)
    assert len(ranks[0]["logged"]) == 3
    return ranks, adapter(folder)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "adapter_model.safetensors")


def assert_trained_alike(ddp: Trained, ranks: Ranks, weights: dict[str, torch.Tensor]) -> None:
    """Loss and gradient norm of three steps, and the adapter that was saved."""
    assert weights.keys() == ddp[1].keys()
    assert all(torch.allclose(weights[name], ddp[1][name], atol=1e-6) for name in weights)
    for a, b in zip(ddp[0][0]["logged"], ranks[0]["logged"], strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.slow
def test_the_packing_script_trains_alike_under_ddp_and_fsdp2(
    ddp: Trained, inputs: list[str], tmp_path: Path, cpu_environment: dict[str, str]
) -> None:
    """Every parameter sharded in one run and none in the other."""
    fsdp = accelerate("accelerate_fsdp2.yaml", tmp_path / "fsdp", cpu_environment, inputs)
    for rank in fsdp:
        assert (rank["world"], rank["wrapped"]) == (2, "FSDPPeftModelForCausalLM")
        assert rank["sharded"] == rank["parameters"] > 20
    assert_trained_alike(ddp, fsdp, adapter(tmp_path / "fsdp"))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_the_packing_script_trains_alike_under_ddp_and_deepspeed(
    ddp: Trained, inputs: list[str], stage: int, tmp_path: Path, cpu_environment: dict[str, str]
) -> None:
    """Every parameter partitioned in stage 3, optimizer state and gradients in stage 2."""
    options = [] if stage == 3 else ["--zero_stage", "2"]
    ranks = accelerate("accelerate_zero3.yaml", tmp_path / "zero", cpu_environment, inputs, *options)
    for rank in ranks:
        assert (rank["world"], rank["wrapped"], rank["stage"]) == (2, "DeepSpeedEngine", stage)
        assert rank["parameters"] > 20
        assert rank["sharded"] == (rank["parameters"] if stage == 3 else 0)
    assert_trained_alike(ddp, ranks, adapter(tmp_path / "zero"))


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
