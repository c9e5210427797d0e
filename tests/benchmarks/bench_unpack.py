"""Forward and backward of a packed row of T tokens by `unpack`, beside padded batches and one document at a time.

    python tests/benchmarks/bench_unpack.py [architecture ...]

CPU, one thread. Documents are lognormal, as in the planner's benchmark, cut to a quarter of the row.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from sft_plugins.packing.unpack import _buckets, install_unpack
from testkit.isolation_oracle import make_documents, packed_batch
from testkit.tiny_models import build

TOKENS = (256, 512, 1024)
REPEATS = 3


def main(names: list[str]) -> None:
    """Print a table of median seconds."""
    torch.set_num_threads(1)
    columns = f"{'tokens':>6} {'docs':>5} {'slots':>6} {'padded':>6} {'calls':>5}"
    print(f"{'architecture':12} {columns} {'unpack':>8} {'padded':>8} {'alone':>8}")
    for name in names:
        for tokens in TOKENS:
            print(_line(name, tokens))


def _line(name: str, tokens: int) -> str:
    lengths = _lengths(tokens)
    tiny = build(name, max_position_embeddings=tokens)
    model, documents = tiny.model, make_documents(lengths, tiny.vocab_size)
    ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    padded = _seconds(lambda: model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()])
    alone = _seconds(lambda: torch.cat([model(input_ids=d[None], use_cache=False).logits[0] for d in documents]))
    install_unpack(model)
    unpacked = _seconds(lambda: model(**packed_batch(documents)).logits)
    buckets = _buckets(np.asarray(lengths), padding=True)
    slots = sum(len(bucket) * max(lengths[i] for i in bucket) for bucket in buckets)
    return (
        f"{name:12} {tokens:6} {len(lengths):5} {slots:6} {ids.numel():6} {len(buckets):5} "
        f"{unpacked:7.3f}s {padded:7.3f}s {alone:7.3f}s"
    )


def _lengths(tokens: int) -> list[int]:
    generator, lengths = np.random.default_rng(0), []
    while sum(lengths) < tokens:
        lengths.append(int(min(generator.lognormal(3, 0.9) + 1, tokens // 4, tokens - sum(lengths))))
    return lengths


def _seconds(run: Callable[[], torch.Tensor]) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run().sum().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main(sys.argv[1:] or ["llama", "mamba", "jamba"])
