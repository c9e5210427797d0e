"""torch's flash attention kernels on a CPU: slow, exact, and as strict about their arguments as the CUDA kernels are.

`torch.nn.attention.varlen.varlen_attn` ends in two operators of which torch has CUDA kernels only. With these in their
place all that leads there and back runs on a CPU: what is asked of the kernel, its layout, its window, its backward pass.

    >>> with flash_on_cpu() as calls:
    ...     varlen_attn(query, key, value, ends, ends, longest, longest, window_size=(-1, 0))
    >>> len(calls)
    1

The meaning of the arguments, and what is refused, are those of `mha_varlen_fwd` and `mha_varlen_bwd` in torch's
`aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from sft_plugins.packing.isolation.backends import kernels

_library: torch.library.Library | None = None
_calls: list[dict[str, Any]] = []


@contextmanager
def flash_on_cpu() -> Iterator[list[dict[str, Any]]]:
    """Half-precision attention of packed rows goes through `varlen_attn` on the CPU; the calls of its kernel are listed."""
    _register()
    _calls.clear()
    with mock.patch.object(kernels, "KERNEL_DEVICES", frozenset({"cpu", "cuda"})):
        yield _calls


def _register() -> None:
    """Once per process: an operator cannot be given a second kernel for the same device."""
    global _library
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        _library.impl("_flash_attention_forward", _forward, "CPU")
        _library.impl("_flash_attention_backward", _backward, "CPU")


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **later: Any,
) -> tuple[torch.Tensor, ...]:
    _check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert dropout_p == 0.0
    assert not return_debug_mask
    assert not any(argument is not None for argument in later.values()), later
    _calls.append(
        {
            "query": query.shape,
            "key": key.shape,
            "lengths": cum_seq_q.diff().tolist(),
            "left": window_size_left,
            "is_causal": is_causal,
        }
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, sums = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for queries, keys in _sequences(cum_seq_q, cum_seq_k):
        q, k, v = _heads_first(query[queries], key[keys], value[keys])
        scores = (q @ k.mT * scale).masked_fill(
            ~_seen(q, k, is_causal, window_size_left, window_size_right), -torch.inf
        )
        out[queries] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
        sums[:, queries] = scores.logsumexp(-1)
    unused = torch.empty(0)
    return out, sums, torch.zeros(2, dtype=torch.uint64), unused, unused


def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[torch.Tensor, ...]:
    _check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert grad_out.shape == out.shape == query.shape
    assert logsumexp.shape == (query.shape[1], len(query))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    gradients = tuple(torch.zeros_like(states, dtype=torch.float32) for states in (query, key, value))
    for queries, keys in _sequences(cum_seq_q, cum_seq_k):
        q, k, v = _heads_first(query[queries], key[keys], value[keys])
        o, upstream, _ = _heads_first(out[queries], grad_out[queries], value[keys])
        seen = _seen(q, k, is_causal, window_size_left, window_size_right)
        weights = (q @ k.mT * scale - logsumexp[:, queries, None]).exp().masked_fill(~seen, 0)
        of_scores = weights * (upstream @ v.mT - (upstream * o).sum(-1, keepdim=True)) * scale
        gradients[0][queries] = (of_scores @ k).transpose(0, 1)
        for gradient, repeated in ((gradients[1], of_scores.mT @ q), (gradients[2], weights.mT @ upstream)):
            # A key head served several query heads, and gets the sum of what they send back.
            gradient[keys] = repeated.unflatten(0, (key.shape[1], -1)).sum(1).transpose(0, 1)
    return tuple(gradient.to(query.dtype) for gradient in gradients)


def _sequences(cum_seq_q: torch.Tensor, cum_seq_k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    ends = [list(map(slice, ends[:-1].tolist(), ends[1:].tolist())) for ends in (cum_seq_q, cum_seq_k)]
    return zip(*ends, strict=True)


def _heads_first(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """fp32 [H, l, D] each, keys and values once per head of the query."""
    repeats = query.shape[1] // key.shape[1]
    return (
        states.float().transpose(0, 1).repeat_interleave(times, 0)
        for states, times in ((query, 1), (key, repeats), (value, repeats))
    )


def _seen(query: torch.Tensor, key: torch.Tensor, is_causal: bool, left: int | None, right: int | None) -> torch.Tensor:
    """bool [queries, keys]: at most `left` keys before a query's own and `right` behind it; -1 sets no limit."""
    left = -1 if left is None else left
    right = 0 if is_causal else -1 if right is None else right
    # The last query stands at the last key.
    ahead = torch.arange(key.shape[1])[None] - torch.arange(query.shape[1])[:, None] - (key.shape[1] - query.shape[1])
    return ((ahead >= -left) | (left < 0)) & ((ahead <= right) | (right < 0))


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
) -> None:
    """What the CUDA kernel refuses; and a longest length too small, which it silently cuts off at."""
    assert query.dtype in (torch.float16, torch.bfloat16), query.dtype
    assert query.dtype == key.dtype == value.dtype
    assert all(states.ndim == 3 and states.stride(-1) == 1 for states in (query, key, value))
    assert key.shape == value.shape
    assert query.shape[1] % key.shape[1] == 0
    assert query.shape[2] == key.shape[2] <= 256
    assert query.shape[2] % 8 == 0
    for ends, states, longest in ((cum_seq_q, query, max_q), (cum_seq_k, key, max_k)):
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert ends[0] == 0
        assert ends[-1] == len(states)
        assert int(ends.diff().max()) <= longest
