"""Forward and backward of a packed row of T tokens by `unpack`, beside padded batches and one document at a time.

    python tests/benchmarks/bench_unpack.py --architectures llama mamba jamba

CPU, one thread. Documents are lognormal, as in the planner's benchmark, cut to a quarter of the row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import Measured, median_seconds, script

from sft_plugins.packing.isolation.backends.unpack import Unpack, _buckets
from sft_plugins.packing.isolation.forward import install
from testkit.isolation_oracle import make_documents, packed_batch
from testkit.tiny_models import build

TOKENS = (256, 512, 1024)
REPEATS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architectures", nargs="+", default=["llama", "mamba", "jamba"])


def measure(options: argparse.Namespace) -> Measured:
    """Median seconds."""
    torch.set_num_threads(1)
    return Measured([_record(name, tokens) for name in options.architectures for tokens in TOKENS])


def _record(name: str, tokens: int) -> dict[str, Any]:
    lengths = _lengths(tokens)
    tiny = build(name, max_position_embeddings=tokens)
    model, documents = tiny.model, make_documents(lengths, tiny.vocab_size)
    ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    padded = _seconds(lambda: model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()])
    alone = _seconds(lambda: torch.cat([model(input_ids=d[None], use_cache=False).logits[0] for d in documents]))
    install(model, Unpack())
    unpacked = _seconds(lambda: model(**packed_batch(documents)).logits)
    buckets = _buckets(np.asarray(lengths), padding=True)
    slots = sum(len(bucket) * max(lengths[i] for i in bucket) for bucket in buckets)
    return {
        "architecture": name,
        "tokens": tokens,
        "documents": len(lengths),
        "slots": slots,
        "padded_slots": ids.numel(),
        "calls": len(buckets),
        "unpack_s": unpacked,
        "padded_s": padded,
        "alone_s": alone,
    }


def _lengths(tokens: int) -> list[int]:
    generator, lengths = np.random.default_rng(0), []
    while sum(lengths) < tokens:
        lengths.append(int(min(generator.lognormal(3, 0.9) + 1, tokens // 4, tokens - sum(lengths))))
    return lengths


def _seconds(run: Callable[[], torch.Tensor]) -> float:
    return median_seconds(lambda: run().sum().backward(), REPEATS)


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
