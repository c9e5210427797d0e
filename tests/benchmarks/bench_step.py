"""A LoRA training step on real conversations: supervised tokens per second, padded and packed in five ways.

    padded      batches of as many documents as a packed row holds on average, padded to their longest
    TRL bfd     TRL's packing and collator with sdpa attention: transformers builds a dense mask from the position ids
    flex        the same batches with flex attention (CUDA only: it has no backward on CPU)
    dense       our packed rows with an explicit block-diagonal mask [1, 1, T, T] and sdpa
    ours        our packed rows and collator on the isolated model

    python tests/benchmarks/bench_step.py --device cuda                                  bf16, full models
    python tests/benchmarks/bench_step.py --device cpu --layers 2 --rows 2048  fp32, small enough for a laptop

Weights are random; ids, masks and lengths are those of `chitchat-dataset` under ChatML. One warm-up step each, which also
compiles; then the sum of supervised tokens over the sum of seconds, CPU seconds on a CPU. A step is forward, backward and
AdamW on the adapter.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_attention import block_diagonal
from datasets import Dataset, disable_progress_bars
from harness import Measured, clock_of, script
from material import MODELS, load_tokenizer, masked_conversations
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sft_plugins import BlockDiagonalPackingCollator, StrictPromptMaskingCollator, pack_dataset
from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.packing.boundaries import Boundaries

METHODS = ("padded", "TRL bfd", "flex", "dense", "ours")


def build_model(name: str, options: argparse.Namespace, attention: str) -> Any:
    torch.manual_seed(0)
    sizes = MODELS[name] | ({"num_hidden_layers": options.layers} if options.layers else {})
    sizes |= {"vocab_size": options.vocabulary} if options.vocabulary else {}
    config = LlamaConfig(max_position_embeddings=max(options.rows), attn_implementation=attention, **sizes)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = LlamaForCausalLM(config).to(options.device, dtype)
    if options.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def batches_of(method: str, documents: Dataset, rows: int, tokenizer: Any, model: Any) -> Iterator[dict[str, Any]]:
    """Batches of about `rows` tokens, on the CPU, without end."""
    if method == "padded":
        mean = sum(map(len, documents["input_ids"])) / len(documents)
        data, size, collate = (
            documents.shuffle(seed=0),
            max(1, round(rows / mean)),
            StrictPromptMaskingCollator(tokenizer),
        )
    elif method in ("TRL bfd", "flex"):
        from trl.data_utils import pack_dataset as trl_pack_dataset
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        data, size = trl_pack_dataset(documents, rows, "bfd").shuffle(seed=0), 1
        collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id or 0, padding_free=True)
    else:
        data, size = pack_dataset(documents, rows, seed=0).dataset, 1
        collate = dense_batch if method == "dense" else BlockDiagonalPackingCollator(tokenizer, model=model)
    while True:
        for at in range(0, len(data) - size + 1, size):
            yield collate([data[i] for i in range(at, at + size)])


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


def time_steps(
    method: str, name: str, rows: int, documents: Dataset, tokenizer: Any, options: argparse.Namespace
) -> dict[str, Any]:
    cuda = options.device == "cuda"
    wait: Callable[[], Any] = torch.cuda.synchronize if cuda else lambda: None
    clock = clock_of(options.device)
    model = build_model(name, options, "flex_attention" if method == "flex" else "sdpa")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batches = batches_of(method, documents, rows, tokenizer, model)
    seconds, supervised, tokens, slots = [], 0, 0, 0
    for step in range(options.steps + 1):
        batch = next(batches)
        if step == 1 and cuda:
            torch.cuda.reset_peak_memory_stats()
        wait()
        start = clock()
        batch = to_device(batch, options.device)
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        if step:
            seconds.append(clock() - start)
            labels = batch["labels"]
            supervised += int((labels[:, 1:] != IGNORE_INDEX).sum())
            mask = batch.get("attention_mask")
            slots += labels.numel()
            tokens += int(mask.sum()) if mask is not None and mask.ndim == 2 else labels.numel()
    return {
        "model": name,
        "layers": options.layers or MODELS[name]["num_hidden_layers"],
        "rows": rows,
        "method": method,
        "supervised_per_s": supervised / sum(seconds),
        "step_s": sum(seconds) / len(seconds),
        "tokens": tokens,
        "padding": 1 - tokens / slots,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS) if gpu else ["SmolLM2-135M"])
    parser.add_argument("--layers", type=int, default=None if gpu else 2, help="by default all on CUDA, 2 on a CPU")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[2048, 8192, 32768] if gpu else [2048], help="tokens per row"
    )
    parser.add_argument("--vocabulary", type=int, default=None if gpu else 8192, help="ids are taken modulo this")
    parser.add_argument("--steps", type=int, default=20 if gpu else 2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--conversations", type=int, default=2000 if gpu else 60)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")


def measure(options: argparse.Namespace) -> Measured:
    disable_progress_bars()
    measured = Measured()
    tokenizer, _ = load_tokenizer()
    for rows in options.rows:
        documents = masked_conversations(tokenizer, rows, options.conversations)
        if options.vocabulary:
            documents = documents.map(narrowed, fn_kwargs={"vocabulary": options.vocabulary})
        for name in options.models:
            for method in options.methods:
                where = f"{method}, {name}, {rows:,}"
                if method == "flex" and options.device == "cpu":
                    measured.skipped[where] = "flex attention has no backward on CPU"
                    continue
                print(where, flush=True)
                try:
                    measured.records.append(time_steps(method, name, rows, documents, tokenizer, options))
                except (ImportError, torch.OutOfMemoryError) as error:
                    measured.skipped[where] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                gc.collect()
                if options.device == "cuda":
                    torch.cuda.empty_cache()
    ours = {(r["model"], r["rows"]): r["supervised_per_s"] for r in measured.records if r["method"] == "ours"}
    for r in measured.records:
        if (r["model"], r["rows"]) in ours:
            r["ours_faster"] = ours[r["model"], r["rows"]] / r["supervised_per_s"]
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
