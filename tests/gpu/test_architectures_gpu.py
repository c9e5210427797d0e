"""Packed rows in half precision are as near to an fp32 oracle as the same documents alone in half precision are.

The oracle is each document run alone in fp32. What half precision costs is measured, not guessed: the error of documents run
alone in it; packed rows may have twice that, and one rounding.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sft_plugins.packing.isolation.apply import isolate
from testkit.devices import DEVICE, packed_on_device
from testkit.isolation_oracle import Run, gap, make_documents, run_alone, run_packed
from testkit.tiny_models import build, build_smooth

pytestmark = pytest.mark.gpu

# What people fine-tune; sliding windows, chunks, soft caps, sinks, GQA, latent attention, experts, ALiBi, state spaces.
ARCHITECTURES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "olmo3", "gpt_oss", "mixtral", "qwen3_moe",
    "gpt_neox", "falcon", "bloom", "opt", "deepseek_v3", "llama4_text", "mamba", "mamba2", "jamba", "qwen3_next",
)  # fmt: skip
LENGTHS = [5, 1, 40, 17, 5, 65]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_in_half_precision_is_as_exact_as_alone(name: str, dtype: torch.dtype, checkpointing: bool) -> None:
    tiny = build_smooth(name)
    model = tiny.model.to(DEVICE)
    if checkpointing and not model.supports_gradient_checkpointing:
        pytest.skip(f"{name} has no gradient checkpointing")
    documents = [document.to(DEVICE) for document in make_documents(LENGTHS, tiny.vocab_size)]
    exact = run_alone(model, documents)
    half = copy.deepcopy(model).to(dtype)
    if checkpointing:
        half.gradient_checkpointing_enable()
    half.train()  # checkpointing acts in training mode only; the tiny models have no dropout
    alone = as_float(run_alone(half, documents))
    report = isolate(half)
    packed = as_float(run_packed(half, documents, batch=packed_on_device))
    cost, measured = gap(exact, alone), gap(exact, packed)
    rounding = torch.finfo(dtype).eps
    assert measured.logits <= 2 * cost.logits + rounding, report.backend
    assert measured.loss <= 2 * cost.loss + rounding, report.backend
    assert measured.gradients <= 2 * cost.gradients + 4 * rounding, (report.backend, measured.worst)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_in_single_precision_is_exact(name: str) -> None:
    """fp32 without TF32: the bounds of the CPU matrix, a hundredfold for sums in another order."""
    tiny = build(name)
    model = tiny.model.to(DEVICE)
    documents = [document.to(DEVICE) for document in make_documents(LENGTHS, tiny.vocab_size)]
    exact = run_alone(model, documents)
    report = isolate(model)
    measured = gap(exact, run_packed(model, documents, batch=packed_on_device))
    assert measured.logits <= 1e-4, report.backend
    assert measured.gradients <= 1e-3, (report.backend, measured.worst)


def as_float(run: Run) -> Any:
    """The run in fp32, so that differences are not rounded once more."""
    return Run([out.float() for out in run.logits], run.loss, {name: g.float() for name, g in run.gradients.items()})
