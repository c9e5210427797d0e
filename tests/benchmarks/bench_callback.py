"""What `ModeCollapseCallback` costs: the same LoRA run without and with it, and the callback's own ledger.

    python tests/benchmarks/bench_callback.py --device cuda --steps 300
    python tests/benchmarks/bench_callback.py --device cpu         2 layers; about four minutes on two cores for both runs

Seconds of `train()`, CPU seconds on a CPU. SmolLM2-135M's shape with random weights, real conversations of up to 512 tokens.
The baseline is made before the first step and counts against the budget (3 % of wall time) that binds the probes after it: a
run too short for it pays for the baseline and one look at the end. So the baseline, with what setting up costs, stands
apart from the probes, in wall seconds of the ledger.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from harness import Measured, clock_of, script
from material import MODELS, load_tokenizer, masked_conversations
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sft_plugins import ModeCollapseCallback, StrictPromptMaskingCollator
from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.probe.prompts import load_prompts


def run(
    options: argparse.Namespace, tokenizer: Any, rows: Any, folder: Path, callbacks: list[Any], *, steps: int
) -> float:
    """Seconds of `train()`."""
    torch.manual_seed(0)
    sizes = MODELS["SmolLM2-135M"] | ({"num_hidden_layers": options.layers} if options.layers else {})
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, **sizes))
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=options.batch,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=options.device == "cpu",
            bf16=options.device == "cuda",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=StrictPromptMaskingCollator(tokenizer),
        callbacks=callbacks,
    )
    clock = clock_of(options.device)
    start = clock()
    trainer.train()
    return clock() - start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--layers", type=int, default=None if gpu else 2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8 if gpu else 1)
    parser.add_argument("--prompts", type=int, default=16 if gpu else 2)
    parser.add_argument("--samples", type=int, default=8 if gpu else 2)
    parser.add_argument("--new-tokens", type=int, default=128 if gpu else 8)


def measure(options: argparse.Namespace) -> Measured:
    disable_progress_bars()
    tokenizer, _ = load_tokenizer()
    rows = masked_conversations(tokenizer, 512, max(64, options.batch * 8))
    prompts = [{"messages": list(p.messages), "tag": p.tag} for p in load_prompts(None)[: options.prompts]]
    with tempfile.TemporaryDirectory() as folder:
        run(options, tokenizer, rows, Path(folder) / "warm-up", [], steps=2)
        plain = run(options, tokenizer, rows, Path(folder) / "plain", [], steps=options.steps)
        watch = ModeCollapseCallback(
            tokenizer,
            prompts,
            samples_per_prompt=options.samples,
            max_new_tokens=options.new_tokens,
            output_dir=Path(folder) / "collapse",
            report=False,
        )
        watched = run(options, tokenizer, rows, Path(folder) / "watched", [watch], steps=options.steps)
        assert watch.history_path is not None
        history = read_history(watch.history_path)
    cost = next(entry["cost"] for entry in reversed(history) if entry.get("cost"))
    baseline, later = cost["seconds_baseline"], cost["seconds"] - cost["seconds_baseline"]
    record = {
        "steps": options.steps,
        "plain_s": plain,
        "watched_s": watched,
        "overhead": watched / plain - 1,
        "wall_s": cost["wall_seconds"],
        "baseline_s": baseline,
        "later_s": later,
        "later_share": later / (cost["wall_seconds"] - baseline),
    }
    names = ("share", "share_tier01", "probes_tier1", "probes_tier2")
    return Measured([record | {name: cost[name] for name in names}])


if __name__ == "__main__":
    script(__doc__, add_arguments, measure)
