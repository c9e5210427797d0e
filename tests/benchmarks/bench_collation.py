"""Collation of packed batches beside transformers', TRL's and, where it is installed, Axolotl's collator.

    batch    one batch of single documents, flattened: milliseconds. Axolotl's `V2BatchSamplerDataCollatorForSeq2Seq` gets one
             bin of rows with the attention mask and position ids that its preparation adds, as multipack hands them over
    epoch    from masked rows to all packed batches of an epoch: packing (planning only, where batches are joined as they are
             drawn: Axolotl), rows out of the data set, collation. CPU seconds

    python tests/benchmarks/bench_collation.py --documents 8 32 128 --epoch 2000

What stands in a batch: ours, transformers' and TRL 1.16's hold position ids, `cu_seq_lens_*`, `max_length_*` and `seq_idx`;
Axolotl's position ids and a mask that numbers the documents. Ours checks every row (lengths, labels, ids, boundaries); the
others check nothing. An epoch is an error where the ways do not supervise equally many tokens. Building a collator, which for
ours proves the model isolated, is no part of either.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from bench_packing import CAPACITY, documents
from datasets import Dataset, disable_caching, disable_progress_bars
from harness import Measured, cpu_seconds, median_seconds, script
from material import load_tokenizer
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.packing import pack_dataset
from sft_plugins.packing.collator import BlockDiagonalPackingCollator

Collate = Callable[[Any], Any]


def tiny_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50_000, **sizes))


def our_collator(rows: str) -> Collate:
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    return BlockDiagonalPackingCollator(tokenizer, model=tiny_model(), rows=rows)


def axolotl_collator() -> Collate:
    from axolotl.utils.collators import V2BatchSamplerDataCollatorForSeq2Seq

    tokenizer, _ = load_tokenizer()
    return V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, padding=True)


def trl_collator() -> Collate:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


# --- one batch ----------------------------------------------------------------------------------------------------------


def multipacked(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """One bin as Axolotl's sampler hands it over."""
    return [
        [
            row | {"attention_mask": [1] * len(row["labels"]), "position_ids": list(range(len(row["labels"])))}
            for row in rows
        ]
    ]


def one_batch(count: int, options: argparse.Namespace, measured: Measured) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(options.length // 2, options.length * 3 // 2, count)
    rows = []
    for length in lengths:
        ids = rng.integers(4, 1000, length).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]]})
    ways: dict[str, tuple[Callable[[], Collate], Any]] = {
        "ours": (functools.partial(our_collator, "documents"), rows),
        "flattening": (lambda: DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True), rows),
        "trl": (trl_collator, rows),
        "axolotl": (axolotl_collator, multipacked(rows)),
    }
    record: dict[str, Any] = {"what": "batch", "documents": count, "tokens": int(lengths.sum())}
    for name, (make, given) in ways.items():
        try:
            record[f"{name}_ms"] = 1e3 * median_seconds(functools.partial(make(), given), options.repeats)
        except ImportError as error:
            measured.skipped[name] = f"not installed: {error}"
    measured.records.append(record)


# --- an epoch -----------------------------------------------------------------------------------------------------------


def our_epoch(rows: Dataset, collate: Collate) -> Iterator[Any]:
    packed = pack_dataset(rows, CAPACITY, seed=0).dataset
    for i in range(len(packed)):
        yield collate(packed.__getitems__([i]))


def trl_epoch(rows: Dataset, collate: Collate) -> Iterator[Any]:
    from trl.data_utils import pack_dataset as trl_pack_dataset

    packed = trl_pack_dataset(rows, CAPACITY, "bfd")
    for i in range(len(packed)):
        yield collate(packed.__getitems__([i]))


def axolotl_epoch(rows: Dataset, collate: Collate) -> Iterator[Any]:
    """`sample_packing: true`: position ids are added, the sampler plans bins, bins are joined as they are drawn."""
    from axolotl.utils.samplers import MultipackBatchSampler, get_dataset_lengths
    from axolotl.utils.trainer import add_position_ids
    from torch.utils.data import RandomSampler

    rows = rows.map(add_position_ids, batched=True)
    # The numbers are Axolotl's defaults for one device; one count of the batches is the least that it takes.
    sampler = MultipackBatchSampler(
        RandomSampler(rows), lengths=get_dataset_lengths(rows), batch_max_len=CAPACITY, batch_size=1, group_size=100_000,
        bin_size=200, num_processes=1, num_count_samples=1,
    )  # fmt: skip
    for (bin_of,) in sampler:
        yield collate([rows.__getitems__(bin_of)])


def epoch(count: int, repeats: int, measured: Measured) -> None:
    rows = documents(count, "int32")
    masked = rows.add_column("attention_mask", [[1] * len(ids) for ids in rows["input_ids"]])
    supervised: dict[str, int] = {}
    ways = {
        "ours": (our_epoch, functools.partial(our_collator, "packed"), rows),
        "trl": (trl_epoch, trl_collator, rows),
        "axolotl": (axolotl_epoch, axolotl_collator, masked),
    }
    for name, (way, make, given) in ways.items():
        try:
            collate = make()
            list(way(given.select(range(8)), collate))  # compiles
            seconds = []
            for _ in range(repeats):
                start, batches, labelled = cpu_seconds(), 0, []
                for batch in way(given, collate):
                    batches += 1
                    labelled.append(batch["labels"])
                seconds.append(cpu_seconds() - start)
        except ImportError as error:
            measured.skipped[f"{name}, epoch"] = f"not installed: {error}"
            continue
        supervised[name] = sum(int((labels != IGNORE_INDEX).sum()) for labels in labelled)
        record = {"what": "epoch", "way": name, "documents": count, "batches": batches, "supervised": supervised[name]}
        measured.records.append(record | {"seconds": statistics.median(seconds)})
    if len(set(supervised.values())) > 1:
        raise ValueError(f"the ways supervise different numbers of tokens: {supervised}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--documents", type=int, nargs="+", default=[8, 32, 128], help="in one batch")
    parser.add_argument("--length", type=int, default=512, help="mean tokens per document of one batch")
    parser.add_argument("--repeats", type=int, default=21, help="of one batch")
    parser.add_argument("--epoch", type=int, default=2000, help="documents of an epoch")
    parser.add_argument("--epochs", type=int, default=3)


def measure(options: argparse.Namespace) -> Measured:
    disable_progress_bars()
    disable_caching()
    measured = Measured()
    for count in options.documents:
        one_batch(count, options, measured)
    epoch(options.epoch, options.epochs, measured)
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
