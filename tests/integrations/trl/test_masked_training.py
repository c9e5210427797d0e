"""The three ways into TRL's SFTTrainer, and transformers' Trainer: loss and gradients are those of the mask, and nothing else.

The oracle is Σ m_t · −log P(x_t | x_<t) by hand in float64. Runs on the oldest and the newest supported TRL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from sft_plugins.errors import MaskingError
from sft_plugins.integrations.trl import check_trainer, sft_arguments
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator, check_masks, mask_dataset
from testkit.tiny_training import one_sgd_step, tiny_llama
from testkit.tokenizers import build_tokenizer

trl = pytest.importorskip("trl")

CHATS = [
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! How are you?"}]},
    {
        "messages": [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "It is four."},
            {"role": "user", "content": "And 3?"},
            {"role": "assistant", "content": "Five."},
        ]
    },
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer("qwen")


def model_for(tokenizer: Any) -> LlamaForCausalLM:
    return tiny_llama(
        tokenizer,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
    )


def lora(model: Any) -> Any:
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return peft.train()


def step(tmp_path: Path) -> dict[str, Any]:
    return one_sgd_step(tmp_path, per_device_train_batch_size=2)


def by_hand(model: Any, rows: list[dict[str, list[int]]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the trainable weights, in float64, one row at a time, without padding."""
    model = model.double().eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for t, label in enumerate(row["labels"]):
            if label != -100:
                total = total - log_p[t - 1, label]
                count += 1
    (total / count).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return float(total.detach() / count), gradients


def step_and_compare(trainer: Any, tokenizer: Any) -> None:
    """One SGD step with learning rate 1: the change of every LoRA weight is its gradient."""
    model = trainer.model
    # A model of its own: what a trainer has wrapped does not copy cleanly.
    loss, gradients = by_hand(lora(model_for(tokenizer)), list(masked(tokenizer)))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert before
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(loss, abs=2e-4)  # the trainer's log is rounded
    for name, p in trainer.model.named_parameters():
        if name in before:
            change = before[name] - p.detach()
            assert torch.allclose(change.double(), gradients[name], atol=1e-5), name
    assert any(float(gradient.abs().max()) > 1e-4 for gradient in gradients.values())


def masked(tokenizer: Any) -> Dataset:
    return mask_dataset(Dataset.from_list(CHATS), PromptMasker(tokenizer)).dataset


def test_rows_masked_first_give_the_loss_and_lora_gradients_of_the_mask(tokenizer: Any, tmp_path: Path) -> None:
    """The recommended way: `mask_dataset`, then TRL leaves the rows alone."""
    rows = masked(tokenizer)
    trainer = trl.SFTTrainer(
        model=lora(model_for(tokenizer)),
        args=trl.SFTConfig(**step(tmp_path), **sft_arguments("masked")),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=StrictPromptMaskingCollator(tokenizer),
        processing_class=tokenizer,
    )
    check = check_trainer(trainer, dataset=rows)
    assert (check.rows, check.rows_compared) == (2, 2)
    assert check.train_collator == check.eval_collator == "StrictPromptMaskingCollator"
    step_and_compare(trainer, tokenizer)


def test_raw_rows_masked_on_the_fly_give_the_same(tokenizer: Any, tmp_path: Path) -> None:
    masker = PromptMasker(tokenizer)
    trainer = trl.SFTTrainer(
        model=lora(model_for(tokenizer)),
        args=trl.SFTConfig(**step(tmp_path), **sft_arguments("raw")),
        train_dataset=Dataset.from_list(CHATS),
        data_collator=StrictPromptMaskingCollator(tokenizer, masker=masker),
        processing_class=tokenizer,
    )
    assert check_trainer(trainer).train_collator == "StrictPromptMaskingCollator"
    step_and_compare(trainer, tokenizer)


def test_plain_trainer_gives_the_same(tokenizer: Any, tmp_path: Path) -> None:
    rows = masked(tokenizer)
    trainer = Trainer(
        model=lora(model_for(tokenizer)),
        args=TrainingArguments(**step(tmp_path)),
        train_dataset=rows,
        data_collator=StrictPromptMaskingCollator(tokenizer),
    )
    check_trainer(trainer, dataset=rows)
    step_and_compare(trainer, tokenizer)


def test_rows_that_a_trainer_holds_are_audited(tokenizer: Any, tmp_path: Path) -> None:
    """M8, planted: the template's newline after the stop token is trained, as TRL 1.9 to 1.16 label a completion."""
    newline = tokenizer("\n")["input_ids"]
    trainer = trl.SFTTrainer(
        model=lora(model_for(tokenizer)),
        args=trl.SFTConfig(**step(tmp_path), **sft_arguments("masked")),
        train_dataset=masked(tokenizer).map(
            lambda row: {name: row[name] + newline for name in ("input_ids", "labels")}
        ),
        processing_class=tokenizer,
    )
    report = check_masks(trainer.train_dataset, tokenizer)
    assert report.rows_in == 2
    assert report.failures["missing_stop"].count == 2
    assert check_masks(masked(tokenizer), tokenizer).ok


def test_a_trainer_without_our_collator_is_found(tokenizer: Any, tmp_path: Path) -> None:
    """P13: a collator that was replaced or never passed."""
    trainer = trl.SFTTrainer(
        model=lora(model_for(tokenizer)),
        args=trl.SFTConfig(**step(tmp_path), **sft_arguments("masked")),
        train_dataset=masked(tokenizer),
        processing_class=tokenizer,
    )
    with pytest.raises(MaskingError, match="collates with") as caught:
        check_trainer(trainer)
    assert caught.value.code == "host_collator"


def test_rows_that_trl_cut_are_found(tokenizer: Any, tmp_path: Path) -> None:
    """M13, M22: with TRL's default `max_length` rows lose their ends, or vanish."""
    rows = masked(tokenizer)
    arguments = {**sft_arguments("masked"), "max_length": 12}
    trainer = trl.SFTTrainer(
        model=lora(model_for(tokenizer)),
        args=trl.SFTConfig(**step(tmp_path), **arguments),
        train_dataset=rows,
        data_collator=StrictPromptMaskingCollator(tokenizer),
        processing_class=tokenizer,
    )
    with pytest.raises(MaskingError) as caught:
        check_trainer(trainer, dataset=rows)
    assert caught.value.code == "host_dataset"


def test_an_unknown_form_of_rows_is_refused() -> None:
    with pytest.raises(MaskingError, match="'masked', 'packed', 'raw'"):
        sft_arguments("padded")  # type: ignore[arg-type]
