"""The CUDA path of `varlen`: torch's variable-length kernel in half precision, held to the error of a dense fp32 oracle.

Without a CUDA device all of it runs but the kernel itself, for which `testkit.flash_stand_in` computes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sft_plugins.packing.isolation.apply import check_isolation, isolate
from sft_plugins.packing.isolation.backends.kernels import Rule, varlen, varlen_supports
from sft_plugins.packing.isolation.boundaries import Boundaries
from testkit.devices import DEVICE, packed_on_device
from testkit.isolation_oracle import gap, make_documents, run_alone, run_packed
from testkit.tiny_models import build, build_smooth

pytestmark = pytest.mark.gpu

LENGTHS = [5, 1, 130, 64, 5, 257]


def dense(states: list[torch.Tensor], boundaries: Boundaries, rule: Rule, scale: float) -> torch.Tensor:
    """Softmax over a dense T×T mask that is False between documents, in the precision of `states`; [1, T, H, D]."""
    query, key, value = states
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    mask = torch.zeros(boundaries.tokens, boundaries.tokens, dtype=torch.bool, device=query.device)
    for start, length in zip(boundaries.starts.tolist(), boundaries.lengths.tolist(), strict=True):
        mask[start : start + length, start : start + length] = rule.mask(length, length, query.device)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [Rule(), Rule(window=1), Rule(window=33), Rule(window=4096)])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 64), (8, 2, 128), (4, 1, 256), (4, 2, 80)])
def test_kernel_and_gradients_are_as_near_to_fp32_as_dense_attention_in_half(
    dtype: torch.dtype, rule: Rule, heads: int, kv_heads: int, size: int
) -> None:
    """Forward and backward: at most twice the error that dense attention in the same type makes, and its rounding."""
    torch.manual_seed(0)
    boundaries, scale = Boundaries(np.array(LENGTHS)), 1.5 * size**-0.5
    T = boundaries.tokens
    states = [torch.randn(1, n, T, size, device=DEVICE).to(dtype) for n in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(1, T, heads, size, device=DEVICE)
    assert varlen_supports(*states, rule=rule, longest=boundaries.max_length, dropout=0.0)

    def run(function: Any, to: torch.dtype) -> list[torch.Tensor]:
        leaves = [state.to(to, copy=True).requires_grad_() for state in states]
        out = function(leaves)
        out.backward(upstream.to(to))
        return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]

    exact = run(lambda s: dense(s, boundaries, rule, scale), torch.float32)
    half = run(lambda s: dense(s, boundaries, rule, scale), dtype)
    ours = run(lambda s: varlen(*s, boundaries=boundaries, rule=rule, scale=scale), dtype)
    # A gradient whose terms cancel (a window of one token) is left with the rounding of those terms.
    unit = torch.finfo(dtype).eps * max(float(a.abs().max()) for a in exact)
    for name, a, b, c in zip(("out", "query", "key", "value"), exact, half, ours, strict=True):
        assert float((c - a).abs().max()) <= 2 * float((b - a).abs().max()) + unit, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "olmo3", "phi3", "qwen3_moe"])
def test_a_model_is_isolated_by_the_kernel(name: str, dtype: torch.dtype, calls: list[Any]) -> None:
    """Logits and gradients as near to fp32 as the same documents alone in half precision, twice their error allowed."""
    tiny = build_smooth(name)
    documents = [document.to(DEVICE) for document in make_documents(LENGTHS, tiny.vocab_size)]
    exact = run_alone(tiny.model.to(DEVICE), documents)
    half = tiny.model.to(dtype)
    alone = run_alone(half, documents)
    assert not calls, "documents alone are served by the model's own attention"
    report = isolate(half)
    assert report.backend == "varlen"
    assert report.leaked == 0
    calls.clear()
    packed = run_packed(half, documents, batch=packed_on_device)
    assert len(calls) == half.config.num_hidden_layers
    cost, measured, rounding = gap(exact, alone), gap(exact, packed), torch.finfo(dtype).eps
    assert measured.logits <= 2 * cost.logits + rounding
    assert measured.gradients <= 2 * cost.gradients + 4 * rounding, measured.worst


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "deepseek_v3"])
def test_what_the_kernel_cannot_compute_is_served_document_by_document(name: str, calls: list[Any]) -> None:
    """Sinks, soft caps, unequal head sizes."""
    assert isolate(build(name).model.to(DEVICE, torch.bfloat16)).leaked == 0
    assert not calls, "the kernel does not compute this"


def test_autocast_reaches_the_kernel(calls: list[Any]) -> None:
    tiny = build("llama")
    model = tiny.model.to(DEVICE)
    isolate(model)
    assert not calls, "fp32 weights, proved in fp32"
    batch = packed_on_device(make_documents(LENGTHS, tiny.vocab_size))
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        model(**batch).logits.float().sum().backward()
    assert calls
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert check_isolation(model).leaked == 0
