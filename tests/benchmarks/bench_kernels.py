"""Attention alone, forward and backward, on the median packed row of real lengths: seconds, and the share of what is possible.

    ours      `varlen` on CUDA in half precision, else scaled-dot-product attention per document
    padded    one causal call on the documents padded to their longest
    dense     one call with a block-diagonal mask [1, 1, T, T]
    flex      flex attention with a block mask, compiled (CUDA only)

Seconds are the median over `--repeats`; CPU seconds on a CPU.

The floor is arithmetic: 2 · heads · head size · Σ l² operations forward (half of all l² scores) and 2.5 times that backward
(flash attention computes the scores again), at the rate at which this device multiplies large square matrices.

    python tests/benchmarks/bench_kernels.py --device cuda
    python tests/benchmarks/bench_kernels.py --device cpu --rows 2048
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from bench_attention import block_diagonal
from harness import Measured, median_seconds, script
from material import MODELS, conversation_lengths
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from sft_plugins.packing.isolation.backends.kernels import Rule, per_document, varlen, varlen_supports
from sft_plugins.packing.isolation.boundaries import Boundaries
from sft_plugins.packing.plan import plan_packs

METHODS = ("ours", "padded", "dense", "flex")


def lengths_of(capacity: int) -> np.ndarray:
    """Documents of the packed row whose Σ l² is the median of all: real conversations, cut at the row's size."""
    lengths = np.minimum(conversation_lengths(), capacity)
    rows = [lengths[pack] for pack in plan_packs(lengths, capacity, seed=0)]
    rows = [row for row in rows if row.sum() > 0.99 * capacity]
    return sorted(rows, key=lambda row: int((row**2).sum()))[len(rows) // 2]


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large square product."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / median_seconds(lambda: a @ a, 10, device=device)


def attention_of(method: str, boundaries: Boundaries, states: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A forward of `[1, heads, T, D]` states."""
    query, key, value = states
    device = query.device
    if method == "ours":
        rule = Rule()
        if varlen_supports(query, key, value, rule=rule, longest=boundaries.max_length, dropout=0.0):
            return lambda: varlen(query, key, value, boundaries=boundaries, rule=rule, scale=None)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        return lambda: per_document(query, key, value, boundaries=boundaries, attend=attend)
    if method == "dense":
        mask = block_diagonal(boundaries).to(device)
        return lambda: scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    if method == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        document, T = boundaries.seq_idx(device)[0], boundaries.tokens
        visible = create_block_mask(
            lambda b, h, q, k: (document[q] == document[k]) & (q >= k), None, None, T, T, device=str(device)
        )
        compiled = torch.compile(flex_attention)
        return lambda: compiled(query, key, value, block_mask=visible, enable_gqa=True)
    lengths = boundaries.lengths.tolist()

    def pad(x: torch.Tensor) -> torch.Tensor:
        parts = [part[0].transpose(0, 1) for part in x.split(lengths, 2)]  # [l, heads, D] each
        return pad_sequence(parts, batch_first=True).transpose(1, 2)

    def padded() -> torch.Tensor:
        return scaled_dot_product_attention(*map(pad, states), is_causal=True, enable_gqa=True)

    return padded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192, 32768] if gpu else [2048, 4096])
    parser.add_argument("--repeats", type=int, default=20 if gpu else 3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))


def measure(options: argparse.Namespace) -> Measured:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    rate = matmul_rate(options.device, dtype)
    measured = Measured()
    for name, sizes in MODELS.items():
        heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        size = sizes.get("head_dim", sizes["hidden_size"] // heads)
        for rows in options.rows:
            boundaries = Boundaries(lengths_of(rows))
            squares = float((boundaries.lengths.astype(np.float64) ** 2).sum())
            floor = 3.5 * 2 * heads * size * squares / rate
            for method in options.methods:
                where = f"{method}, {name}, {rows:,}"
                if method == "flex" and options.device == "cpu":
                    measured.skipped[where] = "flex attention has no backward on CPU"
                    continue
                torch.manual_seed(0)
                shapes = (heads, kv_heads, kv_heads)
                states = [
                    torch.randn(1, n, boundaries.tokens, size, device=options.device, dtype=dtype, requires_grad=True)
                    for n in shapes
                ]
                try:
                    forward = attention_of(method, boundaries, states)
                    seconds = median_seconds(
                        lambda run=forward: run().sum().backward(), options.repeats, device=options.device
                    )
                except RuntimeError as error:  # out of memory, or what a compiler cannot do
                    if method == "ours" and not isinstance(error, torch.OutOfMemoryError):
                        raise
                    first, *_ = str(error).split("\n")
                    measured.skipped[where] = f"{type(error).__name__}: {first}"
                    continue
                measured.records.append(
                    {
                        "model": name,
                        "rows": rows,
                        "documents": len(boundaries.lengths),
                        "squares_share": squares / boundaries.tokens**2,
                        "method": method,
                        "seconds": seconds,
                        "floor_s": floor,
                        "of_floor": floor / seconds,
                        "matmul_gflops": rate / 1e9,
                    }
                )
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
