"""The callback in TRL's `SFTTrainer`: found by itself, bit-identical, its records beside TRL's own (C2, C3, C10)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, set_seed

from testkit.watched_runs import (
    OPTIONS,
    PROMPTS,
    added_records,
    byte_tokenizer,
    fake_embedder,
    fingerprint,
    lora,
    plain_arguments,
    rows,
    tiny_model,
)

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from sft_plugins.collapse.callback import ModeCollapseCallback  # noqa: E402


def sft(model: Any, folder: Path, callbacks: list[TrainerCallback], **changes: Any) -> Any:
    set_seed(5)
    config = trl.SFTConfig(**{**plain_arguments(folder), "max_length": None, "bf16": False, **changes})
    evaluated = {"eval_dataset": datasets.Dataset.from_list(rows(4, seed=9))} if "eval_strategy" in changes else {}
    trainer = trl.SFTTrainer(
        model,
        config,
        train_dataset=datasets.Dataset.from_list(rows()),
        processing_class=byte_tokenizer(),
        callbacks=callbacks,
        **evaluated,
    )
    trainer.train()
    return trainer


def watcher(folder: Path, **changes: Any) -> ModeCollapseCallback:
    options = {**OPTIONS, "embedder": fake_embedder, "output_dir": folder, "max_new_tokens": 6, "every_steps": 2}
    return ModeCollapseCallback(byte_tokenizer(), PROMPTS, **{**options, "eval_pairs": rows(3), **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("full", {"logging_steps": 2}),
        ("lora", {"gradient_checkpointing": True}),
        ("lora", {"gradient_checkpointing": False, "gradient_accumulation_steps": 2, "max_steps": 4}),
        ("full", {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 3}),
    ],
    ids=["full", "lora-checkpointing", "lora-accumulation", "evaluation"],
)
def test_the_run_is_the_same_bit_for_bit(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """C2, C3: TRL's own window of metrics (entropy, accuracy, tokens) averages the same steps as before."""
    make = {"full": tiny_model, "lora": lambda: lora(tiny_model())}[kind]
    bare = fingerprint(sft(make(), tmp_path / "a", [], **changes))
    trainer = sft(make(), tmp_path / "b", [watcher(tmp_path / "w")], **changes)
    watched = fingerprint(trainer)
    assert any("entropy" in r for r in bare["history"]), "TRL must have logged metrics of its own"
    assert len(added_records(trainer)) >= 3
    assert watched == bare


def test_the_trainer_is_found_when_the_callback_is_added_late(tmp_path: Path) -> None:
    class Late(TrainerCallback):
        pass

    watch = watcher(tmp_path / "w")
    config = trl.SFTConfig(**{**plain_arguments(tmp_path), "max_length": None, "bf16": False, "max_steps": 2})
    trainer = trl.SFTTrainer(
        tiny_model(),
        config,
        train_dataset=datasets.Dataset.from_list(rows()),
        processing_class=byte_tokenizer(),
        callbacks=[Late()],
    )
    assert watch.attach(trainer) is watch
    watch.attach(trainer)
    assert sum(c is watch for c in trainer.callback_handler.callbacks) == 1
    trainer.train()
    assert [r["step"] for r in added_records(trainer)] == [0, 2]


def test_a_fused_head_that_gives_no_logits_changes_nothing(tmp_path: Path) -> None:
    """C10: TRL's chunked loss returns no logits to anybody; the probe reads its own."""
    if "loss_type" not in trl.SFTConfig.__dataclass_fields__:
        pytest.skip("this TRL has no loss_type")
    trainer = sft(tiny_model(), tmp_path / "a", [watcher(tmp_path / "w")], loss_type="chunked_nll", max_steps=2)
    assert added_records(trainer)[-1]["collapse/heldout_loss"] > 0
