"""What preparation costs, in wall and CPU seconds: ours with and without the extra `fast`, TRL's, and the bare tokenizer.

    conversations   of 2, 6 and 34 messages, under ChatML with generation markers, which TRL needs; of 2 and 6 also several
                    times as many, since what a masker and the cache's fingerprint cost once is much of a short run
    tools           every answer found by a call, its result read       } under Qwen3's template (TRL: with its markers),
    reasoning       every answer thought over, so that rows are split   } which leaves earlier reasoning out
    split           the 34 messages under it: 17 rows each of ours, one of TRL's, whose ids are not what generation is given
    34, two processes / two threads    `num_proc=2`; the tokenizer's own threads

Ours builds its masker each time; `fastokens` is built beforehand, as it is after the first megabyte of a data set's text.
The bare tokenizer encodes the rendered texts and does nothing else. Where `fastokens` is missing, its column is.

    python tests/benchmarks/bench_preparation.py [--rows 1000] [--rounds 3] [--json out.json]
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench_masking import conversations, quiet, trl_preparation
from datasets import Dataset
from harness import Measured, cpu_seconds, script
from material import TEMPLATE, load_tokenizer

from sft_plugins.masking import PromptMasker, mask_dataset
from sft_plugins.masking.encoding import fast

LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a text up.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
    },
}


def with_tools(row: dict[str, Any]) -> dict[str, Any]:
    messages = []
    for message in row["messages"]:
        if message["role"] == "assistant":
            call = {"type": "function", "function": {"name": "look_up", "arguments": {"text": message["content"][:40]}}}
            messages += [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "Found."},
            ]
        messages.append(message)
    return {"messages": messages, "tools": [LOOK_UP]}


def with_reasoning(row: dict[str, Any]) -> dict[str, Any]:
    thought = [
        {**message, "reasoning_content": f"They said: {message['content'][:60]}"}
        if message["role"] == "assistant"
        else message
        for message in row["messages"]
    ]
    return {"messages": thought}


def ours(dataset: Dataset, tokenizer: Any, *, extra: bool, num_proc: int | None = None) -> Dataset:
    found, fast.installed = fast.installed, fast.installed if extra else lambda: False
    try:
        return mask_dataset(dataset, PromptMasker(tokenizer), num_proc=num_proc).dataset
    finally:
        fast.installed = found


def bare(texts: list[str], tokenizer: Any) -> list[list[int]]:
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encoded]


def under(template: str, run: Callable[[], Any], tokenizer: Any, threads: str) -> Callable[[], Any]:
    """`run` with `template` set and the tokenizer's threads on or off."""

    def prepared() -> Any:
        tokenizer.chat_template, os.environ["TOKENIZERS_PARALLELISM"] = template, threads
        return run()

    return prepared


def timed(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median wall and CPU seconds of each, taken in turns after a warm-up."""
    found: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            gc.collect()
            cpu, wall = cpu_seconds(), time.perf_counter()
            ways[name]()
            if number:
                found.setdefault(f"{name}_s", []).append(cpu_seconds() - cpu)
                found.setdefault(f"{name}_wall_s", []).append(time.perf_counter() - wall)
    return {name: statistics.median(values) for name, values in found.items()}


def ways_of(
    rows: list[dict[str, Any]],
    tokenizer: Any,
    templates: tuple[str, str],
    *,
    num_proc: int | None = None,
    threads: str = "false",
) -> dict[str, Callable[[], Any]]:
    """`templates`: ours and TRL's, which differ in generation markers alone."""
    dataset = Dataset.from_list(rows)
    tokenizer.chat_template = templates[0]
    texts = [tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False) for row in rows]
    mine = functools.partial(ours, dataset, tokenizer, num_proc=num_proc)
    ways: dict[str, tuple[str, Callable[[], Any]]] = {"ours": (templates[0], lambda: mine(extra=False))}
    if fast.installed():
        ways["fast"] = templates[0], lambda: mine(extra=True)
    if num_proc is None:
        ways["bare"] = templates[0], lambda: bare(texts, tokenizer)
    ways["trl"] = templates[1], lambda: trl_preparation(dataset, tokenizer, num_proc=num_proc)
    return {name: under(template, run, tokenizer, threads) for name, (template, run) in ways.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1000, help="conversations per data set")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each side")


def measure(options: argparse.Namespace) -> Measured:
    from trl.chat_template_utils import qwen3_chat_template, qwen3_training_chat_template

    quiet()
    tokenizer, name = load_tokenizer()
    measured = Measured()
    if fast.installed():
        fast.build(tokenizer.backend_tokenizer.to_str())
    else:
        measured.skipped["ours with the extra fast"] = "not installed: No module named 'fastokens'"
    two, six, long = (conversations(options.rows, n, whole=True) for n in (2, 6, 34))
    chatml, qwen3 = (TEMPLATE, TEMPLATE), (qwen3_chat_template, qwen3_training_chat_template)
    sets: list[tuple[str, list[dict[str, Any]], tuple[str, str], dict[str, Any]]] = [
        ("2 messages", two, chatml, {}),
        ("2 messages", conversations(4 * options.rows, 2, whole=True), chatml, {}),
        ("6 messages", six, chatml, {}),
        ("6 messages", conversations(2 * options.rows, 6, whole=True), chatml, {}),
        ("34 messages", long, chatml, {}),
        ("6 messages, tools", [with_tools(row) for row in six], qwen3, {}),
        ("6 messages, reasoning", [with_reasoning(row) for row in six], qwen3, {}),
        ("34 messages, split", long, qwen3, {}),
        ("34 messages, two processes", long, chatml, {"num_proc": 2}),
        ("34 messages, two threads", long, chatml, {"threads": "true"}),
    ]
    for what, rows, templates, more in sets:
        ways = ways_of(rows, tokenizer, templates, **more)
        measured.records.append({"what": what, "rows": len(rows), "tokenizer": name, **timed(ways, options.rounds)})
    return measured


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
