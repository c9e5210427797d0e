"""The CUDA path of `varlen`: torch's variable-length kernel in half precision, held to the error of a dense fp32 oracle.

Every test skips, with its reason, where there is no CUDA device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sft_plugins.packing.attention as attention
from sft_plugins.packing.boundaries import Boundaries
from sft_plugins.packing.isolation import check_isolation, isolate
from sft_plugins.packing.kernels import Rule, varlen, varlen_supports
from testkit.isolation_oracle import make_documents, packed_batch
from testkit.tiny_models import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device for torch's variable-length kernel"),
]

LENGTHS = [5, 1, 130, 64, 5, 257]


def dense(states: list[torch.Tensor], boundaries: Boundaries, rule: Rule, scale: float) -> torch.Tensor:
    """Softmax over a dense T×T mask that is False between documents, in the precision of `states`; [1, T, H, D]."""
    query, key, value = states
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    mask = torch.zeros(boundaries.tokens, boundaries.tokens, dtype=torch.bool, device=query.device)
    for start, length in zip(boundaries.starts.tolist(), boundaries.lengths.tolist(), strict=True):
        mask[start : start + length, start : start + length] = rule.mask(length, query.device)
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
    boundaries, scale = Boundaries(np.array(LENGTHS)), size**-0.5
    T = boundaries.tokens
    states = [torch.randn(1, n, T, size, device="cuda").to(dtype) for n in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(1, T, heads, size, device="cuda")
    assert varlen_supports(*states, rule=rule, longest=boundaries.max_length, dropout=0.0)

    def run(function: Any, to: torch.dtype) -> list[torch.Tensor]:
        leaves = [state.to(to).requires_grad_() for state in states]
        out = function(leaves)
        out.backward(upstream.to(to))
        return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]

    exact = run(lambda s: dense(s, boundaries, rule, scale), torch.float32)
    half = run(lambda s: dense(s, boundaries, rule, scale), dtype)
    ours = run(lambda s: varlen(*s, boundaries=boundaries, rule=rule, scale=scale), dtype)
    for name, a, b, c in zip(("out", "query", "key", "value"), exact, half, ours, strict=True):
        unit = torch.finfo(dtype).eps * float(a.abs().max())
        assert float((c - a).abs().max()) <= 2 * float((b - a).abs().max()) + unit, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_a_model_is_isolated_by_the_kernel_bit_for_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(attention, "varlen", lambda *a, **k: calls.append(1) or varlen(*a, **k))
    report = isolate(build(name).model.to("cuda", dtype))
    assert report.backend == "varlen"
    assert calls, "the kernel was never reached"
    assert report.leaked == 0


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "deepseek_v3"])
def test_what_the_kernel_cannot_compute_is_served_document_by_document(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sinks, soft caps, unequal head sizes."""
    monkeypatch.setattr(attention, "varlen", lambda *a, **k: pytest.fail("the kernel does not compute this"))
    assert isolate(build(name).model.to("cuda", torch.bfloat16)).leaked == 0


def test_autocast_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, calls = build("llama"), []
    model = tiny.model.to("cuda")
    isolate(model)
    monkeypatch.setattr(attention, "varlen", lambda *a, **k: calls.append(1) or varlen(*a, **k))
    batch = packed_batch([document.cuda() for document in make_documents(LENGTHS, tiny.vocab_size)])
    batch = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(**batch).logits.float().sum().backward()
    assert calls
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert check_isolation(model).leaked == 0
