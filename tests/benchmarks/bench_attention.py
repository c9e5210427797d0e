"""CPU forward + backward of a small Llama: packed (isolated) beside padded and beside a dense 4-D mask, as rows grow.

Documents have one mean length, whatever the row, so packed cost must grow like T (that is Σ l²), a dense mask's like T².

    python tests/benchmarks/bench_attention.py --tokens 1024 2048 4096 8192 16384
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import Measured, median_seconds, script
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from sft_plugins.packing.isolation.apply import isolate
from sft_plugins.packing.isolation.boundaries import Boundaries


def documents_of(tokens: int, mean: int, seed: int) -> list[torch.Tensor]:
    """Lognormal lengths around `mean`, clipped to [8, 4·mean], filling exactly `tokens`."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = int(np.clip(rng.lognormal(np.log(mean), 0.9), 8, 4 * mean))
        lengths.append(min(drawn, tokens - sum(lengths)))
    return [torch.from_numpy(rng.integers(0, 1000, (1, length))) for length in lengths]


def block_diagonal(boundaries: Boundaries) -> torch.Tensor:
    """The mask [1, 1, T, T], True where a token sees: itself and what comes before it in its document."""
    document = boundaries.seq_idx("cpu")[0]
    mask = torch.ones(len(document), len(document), dtype=torch.bool).tril_()
    mask &= document[:, None] == document
    return mask[None, None]


def dense_batch(documents: list[torch.Tensor]) -> dict[str, Any]:
    """The row with its mask."""
    boundaries = Boundaries(np.array([d.shape[1] for d in documents]))
    return {
        "input_ids": torch.cat(documents, 1),
        "position_ids": boundaries.position_ids("cpu"),
        "attention_mask": block_diagonal(boundaries),
    }


def padded_batch(documents: list[torch.Tensor]) -> dict[str, Any]:
    """One document per row, padded to the longest."""
    rows = [document[0] for document in documents]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": pad_sequence(rows, batch_first=True), "attention_mask": mask}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--mean", type=int, default=256, help="median document length")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dense-up-to", type=int, default=8192, help="rows beyond take too long with a dense mask")


def measure(options: argparse.Namespace) -> Measured:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000
    )
    plain, model = LlamaForCausalLM(config), LlamaForCausalLM(config)
    isolate(model)

    def step(which: LlamaForCausalLM, batch: dict[str, Any]) -> Callable[[], None]:
        def run() -> None:
            which(**batch).logits.sum().backward()

        return run

    measured = Measured()
    for tokens in options.tokens:
        documents = documents_of(tokens, options.mean, seed=0)
        lengths = np.array([d.shape[1] for d in documents])
        packed = {"input_ids": torch.cat(documents, dim=1), **Boundaries(lengths).batch("cpu")}
        record = {
            "tokens": tokens,
            "documents": len(documents),
            "squares_share": float((lengths**2).sum()) / tokens**2,
            "packed_s": median_seconds(step(model, packed), options.repeats),
            "padded_s": median_seconds(step(plain, {**padded_batch(documents), "use_cache": False}), options.repeats),
        }
        if tokens <= options.dense_up_to:
            record["dense_s"] = median_seconds(
                step(plain, {**dense_batch(documents), "use_cache": False}), options.repeats
            )
        else:
            measured.skipped[f"a dense mask of {tokens:,} tokens"] = "--dense-up-to"
        measured.records.append(record)
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
