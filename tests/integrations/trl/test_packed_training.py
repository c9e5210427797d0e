"""Packed training through TRL's SFTTrainer and transformers' Trainer gives the gradients of padded training.

One optimiser step of plain SGD is taken, over all documents, so that the weights after it are the gradients; the padded
run is the oracle. Runs on the oldest and the newest supported TRL.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, TaskType
from tokenizers import Tokenizer, models
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers import DataCollatorWithFlattening as Flattening

from sft_plugins.errors import ContaminationError
from sft_plugins.integrations.trl import check_trainer, sft_arguments
from sft_plugins.packing import pack_dataset
from sft_plugins.packing.collator import BlockDiagonalPackingCollator
from sft_plugins.packing.isolation.apply import check_isolation, isolate
from testkit.isolation_oracle import make_documents
from testkit.leaky import LEAKS
from testkit.tiny_models import build
from testkit.tiny_training import one_sgd_step

trl = pytest.importorskip("trl")

LENGTHS = [5, 9, 2, 17, 3, 9, 12, 4]
ROWS_OF = [(0, 3), (1, 5), (2, 6), (4, 7)]
"""Which documents share a packed row."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 96)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def documents() -> list[dict[str, list[int]]]:
    """Every document supervised after its first third, unevenly."""
    rows = []
    for ids in make_documents(LENGTHS, 96):
        labels = ids.clone()
        labels[: max(1, len(ids) // 3)] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def packed_rows() -> list[dict[str, list[int]]]:
    flat = documents()
    return [
        {
            "input_ids": flat[a]["input_ids"] + flat[b]["input_ids"],
            "labels": flat[a]["labels"] + flat[b]["labels"],
            "seq_lengths": [LENGTHS[a], LENGTHS[b]],
        }
        for a, b in ROWS_OF
    ]


def arguments(kind: Any, tmp_path: Path, **changes: Any) -> Any:
    common = one_sgd_step(tmp_path, learning_rate=0.1, seed=0)
    # TRL's loss on expert routing is no sum over tokens: it depends on which documents share a micro-batch.
    if "router_aux_loss_coef" in kind.__dataclass_fields__:
        common["router_aux_loss_coef"] = 0.0
    return kind(**{**common, **changes})


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.CAUSAL_LM, init_lora_weights=False)


def beginning_alike() -> list[dict[str, list[int]]]:
    """Rows with one long prompt, and one turn of each told again in the next, as templates that rewrite history do."""
    prompt, rows = make_documents([24], 96, seed=1)[0].tolist(), []
    for ids in (ids.tolist() for ids in make_documents([6, 9, 3, 7], 96)):
        rows.append({"input_ids": [*prompt, 91, *ids], "labels": [-100] * (len(prompt) + 1) + ids})
        prompt += ids
    return rows


def sft_run(name: str, tmp_path: Path, how: str, **changes: Any) -> tuple[dict[str, torch.Tensor], float, Any]:
    """Weights after one step, its loss, and the trainer. `how`: padded, documents, packed, alike (padded) or trees."""
    model = build(name).model
    if how in ("padded", "alike"):
        data, size, options = documents() if how == "padded" else beginning_alike(), 4 if how == "padded" else 2, {}
    elif how == "documents":
        data, size = documents(), 4
        options = {"data_collator": BlockDiagonalPackingCollator(tokenizer(), model=model, rows="documents")}
    elif how == "trees":
        rows = beginning_alike()
        halves = [pack_dataset(Dataset.from_list(half), 64, share_prefixes=True) for half in (rows[:2], rows[2:])]
        assert all(report.prefixes.tree_tokens < report.prefixes.row_tokens - 20 for _, report in halves)
        data, size = [row for half, _ in halves for row in half], 1
        options = {"data_collator": BlockDiagonalPackingCollator(tokenizer(), model=model)}
        changes["remove_unused_columns"] = sft_arguments("packed")["remove_unused_columns"]
    else:
        data, size = packed_rows(), 2
        options = {"data_collator": BlockDiagonalPackingCollator(tokenizer(), model=model)}
    torch.manual_seed(0)
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(
            trl.SFTConfig,
            tmp_path,
            max_length=None,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=2,
            **changes,
        ),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
        peft_config=lora(),
        **options,
    )
    loss = trainer.train().training_loss
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}, loss, trainer


def assert_same_step(expected: dict[str, torch.Tensor], measured: dict[str, torch.Tensor], start: Any) -> None:
    """Equal movements, within 1e-4 of the largest movement of each parameter."""
    assert expected.keys() == measured.keys()
    moved = 0.0
    for name, value in expected.items():
        movement = float((value - start[name]).abs().max())
        moved = max(moved, movement)
        assert float((measured[name] - value).abs().max()) <= 1e-4 * movement + 1e-6, name
    assert moved > 1e-3, "nothing was learned: the test would prove nothing"


def initial(name: str) -> dict[str, torch.Tensor]:
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(build(name).model, lora())
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "opt", "falcon"])
def test_sft_trainer_takes_the_same_step_packed_and_padded(name: str, tmp_path: Path) -> None:
    """P12: loss and LoRA gradients over a whole accumulation step, documents of uneven length."""
    start = initial(name)
    padded, loss, _ = sft_run(name, tmp_path, "padded")
    for how in ("documents", "packed"):
        packed, packed_loss, trainer = sft_run(name, tmp_path, how)
        assert packed_loss == pytest.approx(loss, rel=1e-5), how
        assert_same_step(padded, packed, start)
        # P13: what feeds the model is our collator, not a replacement.
        assert isinstance(trainer.get_train_dataloader().collate_fn, BlockDiagonalPackingCollator)
        assert check_isolation(trainer.model).leaked == 0


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_sft_trainer_takes_the_same_step_on_trees_as_on_their_rows(name: str, tmp_path: Path) -> None:
    start, (padded, loss, _), (trees, tree_loss, trainer) = (
        initial(name), sft_run(name, tmp_path, "alike"), sft_run(name, tmp_path, "trees")
    )  # fmt: skip
    assert_same_step(padded, trees, start)
    assert tree_loss == pytest.approx(loss, rel=1e-5)
    assert check_trainer(trainer).prefix_trees is True
    trainer.data_collator.isolation = dataclasses.replace(trainer.data_collator.isolation, prefix_trees=False)
    with pytest.raises(ContaminationError, match=r"2 of 2 rows hold trees") as caught:
        check_trainer(trainer)
    assert caught.value.code == "prefix_trees"


def test_gradient_checkpointing_through_sft_trainer(tmp_path: Path) -> None:
    start = initial("gpt_oss")
    padded, loss, _ = sft_run("gpt_oss", tmp_path, "padded")
    packed, packed_loss, _ = sft_run("gpt_oss", tmp_path, "packed", gradient_checkpointing=True)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert_same_step(padded, packed, start)


def test_evaluation_through_sft_trainer_is_isolated_too(tmp_path: Path) -> None:
    """P11: one batch of all documents, so that both means are over the same tokens."""
    losses = {}
    for how, size in (("padded", 8), ("packed", 4)):
        *_, trainer = sft_run("gpt_oss", tmp_path, how, per_device_eval_batch_size=size, learning_rate=0.0)
        losses[how] = trainer.evaluate()["eval_loss"]
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-5)


def test_boundaries_survive_the_pruning_of_columns(tmp_path: Path) -> None:
    """P10: with `remove_unused_columns` left on, `seq_lengths` reaches the collator, or the collator refuses."""
    *_, trainer = sft_run("llama", tmp_path, "packed", remove_unused_columns=True)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["cu_seq_lens_q"].numel() == 5
    assert "attention_mask" not in batch


@pytest.mark.parametrize(("name", "trees"), [("llama", False), ("gpt_oss", False), ("gpt_oss", True)])
def test_the_plain_trainer_takes_the_same_step_packed_and_padded(name: str, trees: bool, tmp_path: Path) -> None:
    def rows_of(packed: bool) -> tuple[list[dict[str, Any]], int]:
        if not trees:
            return (packed_rows(), 2) if packed else (documents(), 4)
        halves = [beginning_alike()[:2], beginning_alike()[2:]]
        kept = [pack_dataset(Dataset.from_list(half), 64, share_prefixes=True).dataset for half in halves]
        return ([row for half in kept for row in half], 1) if packed else (beginning_alike(), 2)

    def run(packed: bool) -> tuple[dict[str, torch.Tensor], float]:
        tiny = build(name)
        collator: Any = DataCollatorForSeq2Seq(tokenizer(), padding=True)
        rows, size = rows_of(packed)
        if packed:
            collator = BlockDiagonalPackingCollator(tokenizer(), model=tiny.model, pad_to_multiple_of=8)
        trainer = Trainer(
            model=tiny.model,
            args=arguments(
                TrainingArguments,
                tmp_path,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=2,
                remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_list(rows),
            data_collator=collator,
        )
        loss = trainer.train().training_loss
        return {n: p.detach().clone() for n, p in tiny.model.named_parameters()}, loss

    start = {n: p.detach().clone() for n, p in build(name).model.named_parameters()}
    (padded, loss), (packed, packed_loss) = run(False), run(True)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert_same_step(padded, packed, start)


def alone_loss(model: torch.nn.Module, batch: dict[str, Any]) -> float:
    """Mean loss of a packed batch's documents, each run alone (the boundaries are where positions restart)."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], batch["input_ids"].shape[1]]
    total, count = 0.0, 0
    with torch.no_grad():
        for a, b in zip(starts, ends, strict=True):
            labels = batch["labels"][0, a:b][1:]
            logits = model(input_ids=batch["input_ids"][:, a:b], use_cache=False).logits[0, :-1]
            total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


def flattened_loss(trainer: Any, batch: dict[str, Any]) -> float:
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, dict(batch)))


def as_one_document(batch: dict[str, Any]) -> dict[str, Any]:
    """The row with its boundaries withheld: a leak of our own, which the comparison must see."""
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    return {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": positions}


def trl_packing(name: str, tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    trainer = trl.SFTTrainer(
        model=build(name).model,
        args=arguments(trl.SFTConfig, tmp_path, packing=True, max_length=64, per_device_train_batch_size=8),
        train_dataset=Dataset.from_list(documents()),
        processing_class=tokenizer(),
    )
    return trainer, next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("name", ["gpt_oss", "opt", "falcon", *LEAKS])
def test_isolate_alone_makes_trls_own_packing_exact(name: str, tmp_path: Path) -> None:
    """After `isolate(model)`, with nothing else changed, TRL's loss is that of its documents run alone."""
    trainer, batch = trl_packing(name, tmp_path)
    assert int((batch["position_ids"] == 0).sum()) == len(LENGTHS)
    expected = alone_loss(trainer.model, batch)
    leaking = flattened_loss(trainer, as_one_document(batch))
    assert abs(leaking - expected) > 1e-3 * expected, "a hundred times what is allowed below"
    isolate(trainer.model)
    assert flattened_loss(trainer, batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("flash_keys", [False, True])
@pytest.mark.parametrize("name", ["gpt_oss", "opt", "falcon", *LEAKS])
def test_isolate_alone_makes_the_flattening_collator_exact(name: str, flash_keys: bool) -> None:
    model = build(name).model
    batch = Flattening(return_flash_attn_kwargs=flash_keys, return_seq_idx=flash_keys)(documents())
    expected = alone_loss(model, batch)

    def loss(batch: dict[str, Any]) -> float:
        with torch.no_grad():
            return float(model(**batch).loss)

    assert abs(loss(as_one_document(batch)) - expected) > 1e-3 * expected, "a hundred times what is allowed below"
    isolate(model)
    assert loss(batch) == pytest.approx(expected, rel=1e-5)


def test_isolate_after_the_trainer_patched_the_forward(tmp_path: Path) -> None:
    """TRL patches `forward` for its fused head; isolating then works, and undoing it gives TRL's forward back."""
    trainer, batch = trl_packing("leaky_attention", tmp_path)
    patched = trainer.model.__dict__.get("forward")
    with isolate(trainer.model) as report:
        assert report.backend == "varlen"
        assert flattened_loss(trainer, batch) == pytest.approx(alone_loss(trainer.model, batch), rel=1e-5)
    assert trainer.model.__dict__.get("forward") is patched
    with pytest.raises(ContaminationError):
        check_isolation(trainer.model)
