"""`docs/axolotl.md`: every YAML in it passes Axolotl's validation, every option and default is the real one, and the lines it
quotes from the log are those that are logged.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl", reason="the Axolotl plug-in runs in Axolotl's environment")

import yaml
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from sft_plugins.errors import MaskingError
from sft_plugins.integrations.axolotl.fields import RowFields
from sft_plugins.integrations.axolotl.log import NAMES, active, idle
from sft_plugins.integrations.axolotl.settings import Settings
from sft_plugins.masking import PromptMasker
from testkit.tokenizers import build_tokenizer

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "axolotl.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
YAMLS = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.S | re.M)
PLUGIN = "sft_plugins.integrations.axolotl.SFTPlugin"
# What a page need not repeat in every snippet.
REST = {
    "base_model": "tiny",
    "plugins": [PLUGIN],
    "datasets": [{"path": "rows.jsonl", "type": "sft_plugins.integrations.axolotl.strategy"}],
    "sequence_len": 256,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "learning_rate": 1e-3,
    "bf16": False,
    "attn_implementation": "sdpa",
}


def validated(data: dict[str, Any]) -> Any:
    manager = PluginManager.get_instance()
    before = dict(manager.plugins)
    try:
        manager.register(PLUGIN)
        cpu = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": "sm_80"}
        torch_version = torch.__version__.split("+")[0]
        return validate_config(DictDefault(data), capabilities=cpu, env_capabilities={"torch_version": torch_version})
    finally:
        manager.plugins.clear()
        manager.plugins.update(before)


def options() -> dict[str, Any]:
    """The snippet with every option."""
    (found,) = (data for data in map(yaml.safe_load, YAMLS) if "collapse" in (data.get("sft_plugins") or {}))
    return found


def test_the_page_has_its_snippets() -> None:
    assert len(YAMLS) == 6


@pytest.mark.parametrize("text", YAMLS)
def test_every_yaml_passes_axolotls_validation(text: str) -> None:
    data = yaml.safe_load(text)
    cfg = validated({**REST, **data})
    assert Settings.read(cfg.sft_plugins.to_dict()) == Settings.read(data.get("sft_plugins"))
    for entry in data.get("datasets") or ():
        RowFields.of(DictDefault(entry))  # what the strategy itself refuses


def test_a_wrong_snippet_would_fail() -> None:
    with pytest.raises(ValueError, match="unknown key `audits`"):
        validated({**REST, "sft_plugins": {"masking": {"audits": "warn"}}})


def test_every_option_is_named_with_its_default() -> None:
    assert Settings.read(options()["sft_plugins"]) == Settings()
    for part, section in options()["sft_plugins"].items():
        assert list(section) == list(type(getattr(Settings(), part)).model_fields), part


def test_the_lines_of_the_log_are_the_real_ones() -> None:
    cfg = {**REST, "sft_plugins": {}}
    everything = Settings()
    assert f"\n{active('train', everything, cfg)}\n" in PAGE
    for command in ("preprocess", "evaluate"):
        _, _, tail = active(command, everything, cfg).partition("audit: error), ")  # type: ignore[arg-type]
        assert f"| `{command}` |" in PAGE
        assert f"`{tail}`" in PAGE
    for command in ("inference", "merge-lora"):
        assert f"takes no part in `axolotl {command}`" in idle(command)  # type: ignore[arg-type]
    theirs = active("train", everything, {**cfg, "sample_packing": True})
    assert re.search(r"(packing \(Axolotl's .*?\))", theirs)[1] in PAGE  # type: ignore[index]


def test_the_quoted_errors_are_the_real_ones() -> None:
    with pytest.raises(ValueError) as caught:
        Settings.read({"masking": {"overflw": "drop"}})
    assert f"\n{caught.value}\n" in PAGE
    row = {"prompt": "Why?", "response": "Because. " * 20}
    masker = PromptMasker(build_tokenizer("qwen"), max_length=8)
    with pytest.raises(MaskingError) as long:
        masker.encode(row)
    told = long.value.in_words(NAMES)
    for error, words in (
        (long.value, 'Raise max_length, or choose overflow="drop"'),
        (told, "Raise `sequence_len`, or choose `sft_plugins.masking.overflow: drop`"),
    ):
        assert str(error.remedy).startswith(words)
        assert words in WORDS
