"""A LoRA training step on real conversations: supervised tokens per second, padded and packed in six ways.

    padded              batches of as many documents as a packed row holds on average, in random order, padded to their longest
    padded, by length   the same batch size, documents of like length together, as the Trainer's `group_by_length` draws them
    TRL bfd             TRL's packing and collator with sdpa attention: transformers builds a dense mask from the position ids
    flex                the same batches with flex attention (CUDA only: it has no backward on CPU)
    dense               our packed rows with an explicit block-diagonal mask [1, 1, T, T] and sdpa
    ours                our packed rows and collator on the isolated model

    python tests/benchmarks/bench_step.py --device cuda          bf16, whole models; about ten minutes on an H100 (an estimate)
    make bench ARGS="step --add --device cuda --models 1B --rows 32768"      a part of it, beside the parts run before
    python tests/benchmarks/bench_step.py --device cpu           fp32, two layers

Weights are random; ids, masks and lengths are those of `chitchat-dataset` under ChatML. Every method trains on the same
documents, all of them, in each pass, and an error is raised where their supervised tokens are not equally many. A step is
forward, backward and AdamW on the adapter; batches are made beforehand. First a warm-up, a whole pass on CUDA (flex
attention compiles for each length) and the last batch on a CPU; then passes are timed, CPU seconds on a CPU, and the figure is
supervised tokens over seconds, the median pass with the slowest and the fastest beside it.

Peak memory is PyTorch's on CUDA. On a CPU each method has a process of its own, and it is the highest resident set above
that before the model was built: weights, adapter and optimizer included, and what the allocator keeps.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from bench_attention import block_diagonal
from datasets import Dataset, disable_progress_bars
from harness import Measured, alone, clock_of, script, waiting
from material import MODELS, load_tokenizer, masked_conversations
from memory import PeakMemory
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sft_plugins import BlockDiagonalPackingCollator, StrictPromptMaskingCollator, pack_dataset
from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.packing.isolation.boundaries import Boundaries

METHODS = ("padded", "padded, by length", "TRL bfd", "flex", "dense", "ours")

_SORTED = 4
"""Batches: the Trainer's `group_by_length` sorts a quarter of the data at a time, fifty batches at most."""

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def build_model(name: str, rows: int, options: argparse.Namespace, attention: str) -> Any:
    torch.manual_seed(0)
    sizes = MODELS[name] | ({"num_hidden_layers": options.layers} if options.layers else {})
    sizes |= {"vocab_size": options.vocabulary} if options.vocabulary else {}
    config = LlamaConfig(max_position_embeddings=rows, attn_implementation=attention, **sizes)
    with torch.device(options.device):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16 if options.device == "cuda" else torch.float32)
    if rows >= options.checkpoint_from:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def batches_of(
    method: str, documents: Dataset, rows: int, tokenizer: Any
) -> tuple[list[list[dict[str, Any]]], Callable[[Any], Collate]]:
    """One pass over the documents as lists of rows, about `rows` tokens each, and what makes their collator for a model."""
    if method.startswith("padded"):
        size = _batch_size(documents, rows)
        order = list(range(len(documents)))
        if method == "padded, by length":
            from transformers.trainer_pt_utils import get_length_grouped_indices

            lengths = [len(ids) for ids in documents["input_ids"]]
            order = get_length_grouped_indices(lengths, size, generator=torch.Generator().manual_seed(0))
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        return [[documents[i] for i in batch] for batch in batches], lambda _: StrictPromptMaskingCollator(tokenizer)
    if method in ("TRL bfd", "flex"):
        from trl.data_utils import pack_dataset as trl_pack_dataset
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id or 0, padding_free=True)
        return [[row] for row in trl_pack_dataset(documents, rows, "bfd")], lambda _: collate
    packed = [[row] for row in pack_dataset(documents, rows, seed=0).dataset]
    if method == "dense":
        return packed, lambda _: dense_batch
    return packed, lambda model: BlockDiagonalPackingCollator(tokenizer, model=model)


def _batch_size(documents: Dataset, rows: int) -> int:
    """Documents that a packed row of `rows` tokens holds on average."""
    return max(1, round(rows * len(documents) / sum(map(len, documents["input_ids"]))))


def dense_batch(features: list[dict[str, Any]]) -> dict[str, Any]:
    """One packed row with its mask, True where a token sees."""
    (row,) = features
    boundaries = Boundaries(row["seq_lengths"])
    return {
        "input_ids": torch.tensor([row["input_ids"]]),
        "labels": torch.tensor([row["labels"]]),
        "position_ids": boundaries.position_ids("cpu"),
        "attention_mask": block_diagonal(boundaries),
    }


def narrowed(row: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Ids modulo `vocabulary`: with few layers the LM head of a whole vocabulary would be nearly all of the step."""
    return {
        "input_ids": [token % vocabulary for token in row["input_ids"]],
        "labels": [label if label == IGNORE_INDEX else label % vocabulary for label in row["labels"]],
    }


def to_device(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def time_passes(
    method: str, name: str, rows: int, documents: Dataset, tokenizer: Any, options: argparse.Namespace
) -> dict[str, Any]:
    disable_progress_bars()  # here too: a process of its own begins here
    cuda = options.device == "cuda"
    batches, collator_for = batches_of(method, documents, rows, tokenizer)
    with nullcontext() if cuda else PeakMemory() as resident:
        model = build_model(name, rows, options, "flex_attention" if method == "flex" else "sdpa")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        collate = collator_for(model)

        def seconds_of(some: list[list[dict[str, Any]]]) -> Iterator[tuple[float, torch.Tensor]]:
            wait, clock = waiting(options.device), clock_of(options.device)
            for features in some:
                batch = collate(features)
                wait()
                start = clock()
                model(**to_device(batch, options.device), use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                wait()
                yield clock() - start, batch["labels"]

        for _ in seconds_of(batches if cuda else batches[-1:]):
            pass
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        passes: list[float] = []
        while len(passes) < options.passes and (not passes or sum(passes) < options.seconds):
            steps = list(seconds_of(batches))
            passes.append(sum(seconds for seconds, _ in steps))
    supervised = sum(int((labels[:, 1:] != IGNORE_INDEX).sum()) for _, labels in steps)
    tokens = sum(len(ids) for ids in documents["input_ids"])
    return {
        "model": name,
        "layers": options.layers or MODELS[name]["num_hidden_layers"],
        "rows": rows,
        "method": method,
        "supervised_per_s": supervised / statistics.median(passes),
        "slowest_per_s": supervised / max(passes),
        "fastest_per_s": supervised / min(passes),
        "passes": len(passes),
        "documents": len(documents),
        "supervised": supervised,
        "tokens": tokens,
        "batches": len(batches),
        "padding": 1 - tokens / sum(labels.numel() for _, labels in steps),
        "checkpointing": rows >= options.checkpoint_from,
        "peak_gib": (torch.cuda.max_memory_allocated() / 2**20 if cuda else resident.mib) / 1024,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--layers", type=int, default=None if gpu else 2, help="by default all on CUDA, 2 on a CPU")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[2048, 8192, 32768] if gpu else [2048], help="tokens per row"
    )
    parser.add_argument("--vocabulary", type=int, default=None if gpu else 8192, help="ids are taken modulo this")
    parser.add_argument("--tokens", type=int, default=98_304 if gpu else 4096, help="in the documents of one pass")
    parser.add_argument("--passes", type=int, default=3 if gpu else 2, help="timed passes over the documents")
    parser.add_argument("--seconds", type=float, default=10 if gpu else 30, help="no further pass after so many")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--checkpoint-from", type=int, default=32768, help="gradient checkpointing for rows of so many tokens"
    )


def documents_of(tokenizer: Any, rows: int, options: argparse.Namespace) -> Dataset:
    """Conversations of at most `rows` tokens, `options.tokens` in all or a little less."""
    documents = masked_conversations(tokenizer, rows, max(8, options.tokens // 50)).shuffle(seed=0)
    fitting, tokens = [], 0
    for i, ids in enumerate(documents["input_ids"]):
        if tokens + len(ids) <= options.tokens:
            fitting.append(i)
            tokens += len(ids)
    documents = documents.select(fitting).select_columns(["input_ids", "labels"])
    if options.vocabulary:
        documents = documents.map(narrowed, fn_kwargs={"vocabulary": options.vocabulary})
    return documents


def measure(options: argparse.Namespace) -> Measured:
    disable_progress_bars()
    measured = Measured()
    tokenizer, _ = load_tokenizer()
    for rows in options.rows:
        documents = documents_of(tokenizer, rows, options)
        for name in options.models:
            supervised: dict[str, int] = {}
            for method in options.methods:
                where = f"{method}, {name}, {rows:,}"
                if method == "flex" and options.device == "cpu":
                    measured.skipped[where] = "flex attention has no backward on CPU"
                    continue
                if method == "padded, by length" and len(documents) < 2 * _SORTED * _batch_size(documents, rows):
                    measured.skipped[where] = (
                        f"{len(documents)} documents are too few for the Trainer to sort any by length"
                    )
                    continue
                print(where, flush=True)
                arguments = (method, name, rows, documents, tokenizer, options)
                try:
                    record = time_passes(*arguments) if options.device == "cuda" else alone(time_passes, *arguments)
                except (ImportError, RuntimeError) as error:  # out of memory, or what a compiler cannot do
                    if method == "ours" and not isinstance(error, torch.OutOfMemoryError):
                        raise
                    first, *_ = str(error).split("\n")
                    measured.skipped[where] = f"{type(error).__name__}: {first}"
                else:
                    measured.records.append(record)
                    supervised[method] = record["supervised"]
                gc.collect()
                if options.device == "cuda":
                    torch.cuda.empty_cache()
            if len(set(supervised.values())) > 1:
                raise ValueError(f"the methods trained on different numbers of supervised tokens: {supervised}")
    ours = {(r["model"], r["rows"]): r["supervised_per_s"] for r in measured.records if r["method"] == "ours"}
    for r in measured.records:
        if (r["model"], r["rows"]) in ours:
            r["ours_faster"] = ours[r["model"], r["rows"]] / r["supervised_per_s"]
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
