"""λ·BA to the bit on disk: what a share of an adapter, or of all weights, is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_plugins.collapse.softening.adapter import AdapterDial, read_config
from sft_plugins.collapse.softening.weights import interpolate
from sft_plugins.errors import CollapseError
from testkit.watched_runs import lora, saved_base

IDS = [[5, 6, 7, 8, 9, 10], [40, 41, 42]]


def adapted(folder: Path, base: Path, **options: Any) -> Path:
    """A LoRA adapter with B drawn at random, saved."""
    model = lora(AutoModelForCausalLM.from_pretrained(base), **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def logits_of(model: Any) -> list[torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits for ids in IDS]


# --- λ·BA, exactly ----------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 7}, "lora_alpha": 6},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}, "lora_alpha": 5},
    "rslora": {"use_rslora": True, "lora_alpha": 12},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "parameters": {"target_modules": [], "target_parameters": ["o_proj.weight"], "lora_dropout": 0.0},
}


@pytest.mark.parametrize("share", [0.75, 0.6])
@pytest.mark.parametrize(
    ("kind", "tied"), [*((kind, False) for kind in KINDS), ("modules_to_save", True), ("embedding", True)]
)
def test_what_is_written_is_that_share_of_the_adapter(tmp_path: Path, kind: str, share: float, tied: bool) -> None:
    """Loaded with PEFT by itself, against W + λ·s·BA computed here in float64 from the files of the whole adapter."""
    from peft import PeftModel

    model = saved_base(tmp_path / "model", tie_word_embeddings=tied)
    whole = adapted(tmp_path / "whole", model, **KINDS[kind])
    dial = AdapterDial(AutoModelForCausalLM.from_pretrained(model), whole)
    dial.write(share, tmp_path / "part")
    errors = dial.check(share, tmp_path / "part", IDS)
    assert errors["scale_error"] < 1e-15
    got = logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "part")))
    want = logits_of(merged_by_hand(model, whole, share))
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, atol=2e-5), float((one - other).abs().max())
    as_trained = logits_of(merged_by_hand(model, whole, 1.0))
    assert not torch.allclose(got[0], as_trained[0], atol=4e-4), "or λ = 1 would pass as well"
    if kind != "modules_to_save":
        assert (tmp_path / "part" / "adapter_model.safetensors").read_bytes() == (
            whole / "adapter_model.safetensors"
        ).read_bytes()


def merged_by_hand(model: Path, adapter: Path, share: float) -> Any:
    """The base with W + λ·s·BA in place of W: B, A, alpha and rank read from the adapter's files, no PEFT in between."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(model)
    if plain.config.tie_word_embeddings:  # an adapter moves one of two tied weights
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    for key, value in tensors.items():
        name = key.removeprefix("base_model.model.")
        target, a = name, None
        for part in (".lora_A.weight", ".lora_embedding_A"):
            if name.endswith(part):
                target, a = name.removesuffix(part), value.double()
                b = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")].double()
        if a is None:
            if ".lora_" not in name:
                parameter = plain.get_parameter(name.replace(".base_layer", ""))
                start = parameter.data.double()
                parameter.data = (start + share * (value.double() - start)).float()
            continue
        last = target.rsplit(".", 1)[-1]
        alpha = config["alpha_pattern"].get(last, config["lora_alpha"])
        rank = config["rank_pattern"].get(last, config["r"])
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        module = plain.get_submodule(target.removesuffix(".base_layer"))
        delta = share * scale * (b @ a)
        delta = delta.T if "embedding" in key else delta
        module.weight.data = (module.weight.data.double() + delta).float()
    return plain


def test_the_scale_is_a_whole_number_wherever_it_can_be(tmp_path: Path, base: Path) -> None:
    whole = adapted(tmp_path / "whole", base, lora_alpha=16, alpha_pattern={"v_proj": 7})
    dial = AdapterDial(AutoModelForCausalLM.from_pretrained(base), whole)
    dial.write(0.75, tmp_path / "part")
    written = json.loads((tmp_path / "part" / "adapter_config.json").read_text())
    assert (written["lora_alpha"], written["alpha_pattern"]) == (12, {"v_proj": 5.25})
    assert isinstance(written["lora_alpha"], int)


def test_turning_to_one_and_back_is_the_adapter_as_it_was(tmp_path: Path, base: Path) -> None:
    whole = adapted(tmp_path / "whole", base, modules_to_save=["lm_head"])
    dial = AdapterDial(AutoModelForCausalLM.from_pretrained(base), whole)
    before = logits_of(dial.model)
    dial.turn(0.0)
    start = logits_of(AutoModelForCausalLM.from_pretrained(base))
    assert all(torch.equal(a, b) for a, b in zip(logits_of(dial.model), start, strict=True))
    dial.turn(0.3)
    dial.turn(1.0)
    assert all(torch.equal(a, b) for a, b in zip(logits_of(dial.model), before, strict=True))


def test_a_wrong_adapter_on_disk_is_found_by_the_check(tmp_path: Path, base: Path) -> None:
    whole = adapted(tmp_path / "whole", base)
    dial = AdapterDial(AutoModelForCausalLM.from_pretrained(base), whole)
    dial.write(0.5, tmp_path / "part")
    with pytest.raises(CollapseError, match="gives logits that differ") as caught:
        dial.check(0.75, tmp_path / "part", IDS)
    assert caught.value.code == "not_equal"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_between_two_weights_lies_what_float64_rounds_to(dtype: torch.dtype) -> None:
    base, tuned = (torch.randn(1000, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    for share in (0.0, 0.25, 0.6, 1.0):
        exact = base.double() + share * (tuned.double() - base.double())
        assert torch.equal(interpolate(base, tuned, share), exact.to(dtype))
    assert torch.equal(interpolate(base, tuned, 1.0), tuned)


def test_defaults_of_an_option_are_no_variant(tmp_path: Path) -> None:
    """A configuration as PEFT writes it, every field in it, is plain LoRA."""
    from peft import LoraConfig

    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert read_config(tmp_path)["peft_type"] == "LORA"


@pytest.mark.parametrize("cut", [0, 4, 9, 200, -1])
def test_weights_cut_anywhere_are_one_error(tmp_path: Path, base: Path, cut: int) -> None:
    whole = adapted(tmp_path / "whole", base)
    path = whole / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CollapseError, match="cannot be read") as caught:
        AdapterDial(AutoModelForCausalLM.from_pretrained(base), whole)
    assert caught.value.code == "adapter_file"


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe{\x00", b"", b"null", b'{"r": 4}'])
def test_a_configuration_that_is_none_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(CollapseError) as caught:
        read_config(tmp_path)
    assert caught.value.code in ("adapter_file", "not_lora")


def test_pickled_and_half_precision_adapters_are_copied_as_they_are(tmp_path: Path, base: Path) -> None:
    whole = adapted(tmp_path / "whole", base)
    tensors = load_file(whole / "adapter_model.safetensors")
    (whole / "adapter_model.safetensors").unlink()
    torch.save({key: value.bfloat16() for key, value in tensors.items()}, whole / "adapter_model.bin")
    dial = AdapterDial(AutoModelForCausalLM.from_pretrained(base), whole)
    dial.write(0.6, tmp_path / "part")
    assert (tmp_path / "part" / "adapter_model.bin").read_bytes() == (whole / "adapter_model.bin").read_bytes()
    assert dial.check(0.6, tmp_path / "part", IDS)["logits_error"] < 1e-4
