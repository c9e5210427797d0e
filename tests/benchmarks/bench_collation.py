"""Collation of one batch of single documents: this library's packing collator beside TRL's and transformers'.

python tests/benchmarks/bench_collation.py --documents 8 32 128
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from harness import Measured, script
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

from sft_plugins.packing.collator import BlockDiagonalPackingCollator


def others() -> dict[str, Callable[[list[dict[str, Any]]], Any]]:
    found: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
        "flattening_ms": DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    }
    try:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    except ImportError:
        return found
    return {**found, "trl_ms": DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)}


def milliseconds(collate: Callable[[list[dict[str, Any]]], Any], rows: list[dict[str, Any]], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        collate(rows)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--documents", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--length", type=int, default=512, help="mean tokens per document")
    parser.add_argument("--repeats", type=int, default=21)


def measure(options: argparse.Namespace) -> Measured:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes))
    ours = BlockDiagonalPackingCollator(SimpleNamespace(pad_token_id=0, eos_token_id=2), model=model, rows="documents")
    collators = {"ours_ms": ours, **others()}
    measured, rng = Measured(), np.random.default_rng(0)
    if "trl_ms" not in collators:
        measured.skipped["TRL"] = "not installed"
    for count in options.documents:
        lengths = rng.integers(options.length // 2, options.length * 3 // 2, count)
        rows = []
        for length in lengths:
            ids = rng.integers(4, 1000, length).tolist()
            rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
        times = {name: milliseconds(collate, rows, options.repeats) for name, collate in collators.items()}
        measured.records.append({"documents": count, "tokens": int(lengths.sum()), **times})
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
