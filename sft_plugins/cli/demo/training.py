"""The demo's training: LoRA through TRL's `SFTTrainer`, set up as the documentation recommends it.

The rows arrive masked, so TRL prepares nothing (`max_length=None` keeps it from cutting rows), and our collator makes the
batches. This is the one file under `sft_plugins/` that may import TRL, and only when training starts.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_plugins.errors import AssetError


@dataclass(frozen=True)
class Recipe:
    """Choices that suit a small model and a few thousand tokens of data; `rows_per_step` rows make an optimizer step."""

    steps: int
    rows_per_step: int
    learning_rate: float = 1e-3
    lora_rank: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """The trainer after training, how long the steps took, and how many tokens (padding apart) they held."""

    trainer: Any
    seconds: float
    tokens: int


def train_lora(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    collator: Any,
    *,
    recipe: Recipe,
    output: Path,
    device: str,
    console: Console,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Fine-tune `model` on `dataset` (masked or packed rows) with LoRA on every linear layer of its blocks.

    Raises:
        AssetError: `missing_package` when TRL or PEFT is not installed.
    """
    try:
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise AssetError(
            f"training needs TRL and PEFT: {error}",
            code="missing_package",
            remedy='run `pip install "sft-plugins[trl]"`.',
        ) from error
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about names that older ones need
    on_gpu = device.startswith("cuda")
    config = SFTConfig(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.rows_per_step,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(5, recipe.steps // 4),
        seed=recipe.seed,
        max_length=None,
        packing=False,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        dataloader_pin_memory=on_gpu,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    bar = _Bar(console, recipe.steps)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[bar, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # it would print a dictionary per step through the progress bar
    with bar.progress:
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    tokens = max((int(entry["num_tokens"]) for entry in trainer.state.log_history if "num_tokens" in entry), default=0)
    return Trained(trainer=trainer, seconds=seconds, tokens=tokens)


class _Bar(TrainerCallback):
    """One progress bar with the running loss."""

    def __init__(self, console: Console, steps: int) -> None:
        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps  loss {task.fields[loss]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._task = self.progress.add_task("training", total=steps, loss="–")

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the host's signature
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.progress.update(self._task, loss=f"{float(logs['loss']):.3f}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self.progress.update(self._task, completed=state.global_step)
