"""The ready YAMLs of `configs/`: the CPU one trains through Axolotl's command line, the others pass its validation, and the
defaults that their comments name are the defaults.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl", reason="the Axolotl plug-in runs in Axolotl's environment")

import yaml
from safetensors.torch import load_file

from sft_plugins.cli.demo.assets import chitchat_rows
from sft_plugins.cli.demo.smollm2 import smollm2_folder
from sft_plugins.integrations.axolotl.settings import CollapseSettings, MaskingSettings, PackingSettings, Settings

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
NAMES = ("axolotl_cpu.yaml", "axolotl_lora.yaml", "axolotl_qlora.yaml")
DEFAULT = re.compile(r"^    (?:# )?(?P<key>\w+): .*Default: (?P<value>[\w.]+)")


def test_every_yaml_is_listed_here() -> None:
    assert {path.name for path in CONFIGS.glob("axolotl_*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_comments_name_the_defaults(name: str) -> None:
    named = {
        found["key"]: found["value"]
        for line in (CONFIGS / name).read_text(encoding="utf-8").splitlines()
        if (found := DEFAULT.match(line)) and found["value"] not in ("its", "log")
    }
    defaults = [section().model_dump() for section in (CollapseSettings, PackingSettings, MaskingSettings)]
    assert len(named) >= 8
    for key, value in named.items():
        held = [yaml.safe_dump(default[key]).split("\n")[0] for default in defaults if key in default]
        assert value in held, key


def test_the_cpu_yaml_names_every_option() -> None:
    text = (CONFIGS / "axolotl_cpu.yaml").read_text(encoding="utf-8")
    for section in (MaskingSettings, PackingSettings, CollapseSettings):
        for key in section.model_fields:
            assert re.search(rf"^    (# )?{key}: ", text, re.MULTILINE), key


@pytest.mark.parametrize("name", NAMES)
def test_yaml_passes_axolotls_validation(name: str) -> None:
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    data = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    manager = PluginManager.get_instance()
    before = dict(manager.plugins)
    gpu = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
    try:
        manager.register(data["plugins"][0])
        cfg = validate_config(
            DictDefault(data), capabilities=gpu, env_capabilities={"torch_version": torch.__version__.split("+")[0]}
        )
    finally:
        manager.plugins.clear()
        manager.plugins.update(before)
    assert Settings.read(cfg.sft_plugins.to_dict()) == Settings.read(data["sft_plugins"])


@pytest.mark.slow
def test_the_cpu_yaml_trains_smollm2_through_the_command_line(tmp_path: Path) -> None:
    """Masked, packed, isolated, watched, to the end: `axolotl train` as a user types it, a real model, real conversations."""
    write_jsonl(tmp_path / "conversations.jsonl", chitchat_rows()[:24])
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("Who are you?", "Tell me a joke.")])
    data: dict[str, Any] = yaml.safe_load((CONFIGS / "axolotl_cpu.yaml").read_text(encoding="utf-8"))
    data |= {"base_model": str(smollm2_folder()), "max_steps": 3, "micro_batch_size": 1}
    data["sft_plugins"]["collapse"] |= {"prompts": "prompts.jsonl", "max_new_tokens": 4, "max_eval_pairs": 2}
    data["sft_plugins"]["collapse"] |= {"embedder": "off"}
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(data))
    ours = {
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    folder = Path(sys.executable).parent
    done = subprocess.run(
        [str(folder / "axolotl"), "train", "cpu.yaml", "--launcher", "python"],
        cwd=tmp_path,
        env={
            **os.environ,
            **ours,
            "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "is active: masking (1 of 1 datasets masked here, audit: error), packing (rows of 256 tokens" in said
    assert "which end on <|im_end|>; 0 faults" in said
    assert "LlamaForCausalLM (float32, cpu): documents isolated, backend varlen" in said
    output = tmp_path / "outputs" / "axolotl_cpu"
    assert (output / "collapse" / "report.html").is_file()
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    losses = [record["loss"] for record in state["log_history"] if "loss" in record]
    assert len(losses) == 3
    assert max(losses) < 7, "a trained model: a random one of this vocabulary begins at 10.8"
    assert any("collapse/heldout_loss" in record for record in state["log_history"])
    adapter = load_file(output / "adapter_model.safetensors")
    moved = [bool(weight.any()) for name, weight in adapter.items() if "lora_B" in name]
    assert len(moved) == 7 * 30, "every linear layer of thirty blocks"
    assert all(moved)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
