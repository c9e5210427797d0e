"""Prefix trees against split rows: tokens, and the seconds of a LoRA training step, on real conversations.

A template that rewrites history (Qwen 3, gpt-oss) makes a row of every turn. Set side by side on the same conversations: their
tokens rendered once, in split rows, and folded into trees; then one pass of training over the split rows packed, and over the
trees. Conversations are made of as many messages as asked for, by joining those of `chitchat-dataset`.

    python tests/benchmarks/bench_trees.py                    fp32, two layers of SmolLM2-135M's shape
    python tests/benchmarks/bench_trees.py --device cuda      bf16, whole models
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import trl
from bench_step import build_model, narrowed, to_device
from datasets import Dataset, disable_progress_bars
from harness import Measured, alone, clock_of, script, waiting
from material import MODELS, load_tokenizer

from sft_plugins import BlockDiagonalPackingCollator, pack_dataset
from sft_plugins.cli.demo.assets import chitchat_rows
from sft_plugins.masking import PromptMasker, mask_dataset

METHODS = ("split rows", "trees")

# What a template's own tokenizer has as single tokens, the one that ends a turn first.
MARKS = {
    "gptoss": ["<|return|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>", "<|call|>"],
    "phi3": ["<|end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"],
}


def conversations(messages: int, count: int) -> Iterator[list[dict[str, str]]]:
    """Real messages, user and assistant in turn, `messages` or one more to a conversation (the last is the assistant's)."""
    turns: list[dict[str, str]] = []
    made = 0
    for row in chitchat_rows():
        turns += row["messages"][: len(row["messages"]) // 2 * 2]
        if len(turns) >= messages:
            end = messages + messages % 2
            if len(turns) < end:
                continue
            yield turns[:end]
            turns, made = [], made + 1
            if made == count:
                return


def masked(template: str, messages: int, options: argparse.Namespace) -> tuple[Dataset, int, int, Any]:
    """Split rows, tokens of the conversations rendered once, how many there are, and the tokenizer."""
    tokenizer, _ = load_tokenizer()
    if marks := MARKS.get(template):
        tokenizer.add_special_tokens({"eos_token": marks[0], "additional_special_tokens": marks[1:]})
    elif template == "qwen3":
        tokenizer.add_tokens(["<think>", "</think>"])
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / f"{template}.jinja").read_text(encoding="utf-8")
    talks = list(conversations(messages, options.conversations))
    once = sum(len(tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]) for talk in talks)
    masker = PromptMasker(tokenizer, max_length=options.rows, overflow="keep_turns", errors="drop")
    rows = mask_dataset(Dataset.from_list([{"messages": talk} for talk in talks]), masker).dataset
    return rows.select_columns(["input_ids", "labels"]), once, len(talks), tokenizer


def seconds_of_passes(rows: Dataset, tokenizer: Any, options: argparse.Namespace) -> dict[str, float]:
    """Of each method the quickest pass, taken in turn: forward, backward and AdamW on the adapter over all packed rows.

    CPU seconds on a CPU. Noise of the machine only adds, and in turn it falls on both.
    """
    disable_progress_bars()
    wait, clock = waiting(options.device), clock_of(options.device)
    trained: dict[str, tuple[Any, Any, list[dict[str, Any]]]] = {}
    for method in METHODS:
        packed = pack_dataset(rows, options.rows, share_prefixes=method == "trees").dataset
        model = build_model("SmolLM2-135M", options.rows, options, "sdpa")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        collate = BlockDiagonalPackingCollator(tokenizer, model=model)
        trained[method] = model, optimizer, [to_device(collate([row]), options.device) for row in packed]

    def one_pass(model: Any, optimizer: Any, batches: list[dict[str, Any]]) -> float:
        wait()
        start = clock()
        for batch in batches:
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        wait()
        return clock() - start

    for model, optimizer, batches in trained.values():  # a warm-up
        one_pass(model, optimizer, batches if options.device == "cuda" else batches[-1:])
    taken: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(options.passes):
        for method in METHODS:
            taken[method].append(one_pass(*trained[method]))
    return {method: min(seconds) for method, seconds in taken.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--templates", nargs="+", default=["qwen3", "gptoss", "phi3"])
    parser.add_argument("--messages", type=int, nargs="+", default=[8, 33])
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--rows", type=int, default=4096, help="tokens per packed row")
    parser.add_argument("--timed", type=int, default=64 if gpu else 4, help="conversations that are trained on")
    parser.add_argument(
        "--layers", type=int, default=None if gpu else 2, help=f"of {MODELS['SmolLM2-135M']['num_hidden_layers']}"
    )
    parser.add_argument("--vocabulary", type=int, default=None if gpu else 8192, help="ids are taken modulo this")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--checkpoint-from", type=int, default=32768)


def measure(options: argparse.Namespace) -> Measured:
    disable_progress_bars()
    measured = Measured()
    for template in options.templates:
        for messages in options.messages:
            rows, once, count, _ = masked(template, messages, options)
            _, report = pack_dataset(rows, options.rows, share_prefixes=True)
            assert report.prefixes is not None
            record: dict[str, Any] = {
                "template": template,
                "messages": messages,
                "conversations": count,
                "rows": options.rows,
                "once_tokens": once,
                "split_tokens": report.prefixes.row_tokens,
                "tree_tokens": report.prefixes.tree_tokens,
                "split_of_once": report.prefixes.row_tokens / once,
                "tree_of_once": report.prefixes.tree_tokens / once,
                "attention_saved": report.prefixes.attention_saved,
            }
            if template == options.templates[0] and options.timed:
                few = argparse.Namespace(**vars(options) | {"conversations": options.timed})
                timed, _, documents, tokenizer = masked(template, messages, few)
                if options.vocabulary:
                    timed = timed.map(narrowed, fn_kwargs={"vocabulary": options.vocabulary})
                cuda = options.device == "cuda"
                arguments = (timed, tokenizer, options)
                seconds = seconds_of_passes(*arguments) if cuda else alone(seconds_of_passes, *arguments)
                for method in METHODS:
                    record[f"{method.split()[0]}_per_s"] = documents / seconds[method]
                record["trees_faster"] = record["trees_per_s"] / record["split_per_s"]
            measured.records.append(record)
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
