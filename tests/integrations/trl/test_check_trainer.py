"""What `check_trainer` finds on a built trainer, before a step is taken. Runs on the oldest and the newest supported TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from transformers import Trainer, TrainingArguments

from sft_plugins.errors import ContaminationError, MaskingError
from sft_plugins.integrations.trl import check_trainer, sft_arguments
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator, mask_dataset
from sft_plugins.packing import BlockDiagonalPackingCollator, isolate, pack_dataset
from testkit.conversations import assistant, user
from testkit.tiny_models import build
from testkit.tokenizers import build_tokenizer

trl = pytest.importorskip("trl")

RAW = Dataset.from_list([{"messages": [user(f"Question {i}"), assistant("Answer " * (i + 1))]} for i in range(9)])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer("qwen")


def masked(tokenizer: Any) -> Dataset:
    return mask_dataset(RAW, PromptMasker(tokenizer)).dataset


def packed(tokenizer: Any) -> Dataset:
    return pack_dataset(masked(tokenizer), 128).dataset


def model_of(name: str, tokenizer: Any) -> Any:
    return build(name, vocab_size=len(tokenizer)).model


def trainer_of(tokenizer: Any, tmp_path: Path, rows: str, model: Any, collator: Any, **more: Any) -> Any:
    arguments = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments, **sft_arguments(rows)),  # type: ignore[arg-type]
        train_dataset=masked(tokenizer) if rows == "masked" else packed(tokenizer),
        data_collator=collator,
        processing_class=tokenizer,
        **more,
    )


def test_packed_rows_for_a_model_that_is_not_isolated_are_found(tokenizer: Any, tmp_path: Path) -> None:
    """P1: a collator built with one instance and a trainer with another leak, and nothing in the batch can tell."""
    collator = BlockDiagonalPackingCollator(tokenizer, model=model_of("opt", tokenizer))
    trainer = trainer_of(tokenizer, tmp_path, "packed", model_of("opt", tokenizer), collator)
    with pytest.raises(ContaminationError, match="another one") as caught:
        check_trainer(trainer)
    assert caught.value.code == "not_isolated"
    isolate(trainer.model)
    assert check_trainer(trainer, dataset=packed(tokenizer)).train_collator == "BlockDiagonalPackingCollator"


def test_a_model_that_is_made_when_training_begins_must_be_isolated_there(tokenizer: Any, tmp_path: Path) -> None:
    def plain() -> Any:
        return model_of("opt", tokenizer)

    def isolated() -> Any:
        model = plain()
        isolate(model)
        return model

    collator = BlockDiagonalPackingCollator(tokenizer, model=plain())
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
    rows = packed(tokenizer)
    trainer = Trainer(model_init=plain, args=arguments, train_dataset=rows, data_collator=collator)
    with pytest.raises(ContaminationError, match="model_init"):
        check_trainer(trainer)
    check_trainer(Trainer(model_init=isolated, args=arguments, train_dataset=rows, data_collator=collator))


def test_virtual_tokens_added_by_the_trainer_are_found(tokenizer: Any, tmp_path: Path) -> None:
    """The collator saw the bare model; the trainer's `peft_config` came later."""
    model = model_of("llama", tokenizer)
    collator = BlockDiagonalPackingCollator(tokenizer, model=model)
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = trainer_of(tokenizer, tmp_path, "packed", model, collator, peft_config=virtual)
    with pytest.raises(ContaminationError, match="PromptTuningConfig") as caught:
        check_trainer(trainer)
    assert caught.value.code == "prompt_learning"


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("rows", ["masked", "packed"])
def test_evaluation_rows_that_nobody_masked_are_found(rows: str, several: bool, tokenizer: Any, tmp_path: Path) -> None:
    """TRL labels raw rows itself, every token of them; the first evaluation would fail, hours later."""
    model = model_of("llama", tokenizer)
    good: Dataset = masked(tokenizer) if rows == "masked" else packed(tokenizer)
    collator: Any = StrictPromptMaskingCollator(tokenizer)
    if rows == "packed":
        collator = BlockDiagonalPackingCollator(tokenizer, model=model)
    for data, fine in ((RAW, False), (good, True)):
        trainer = trainer_of(
            tokenizer, tmp_path, rows, model, collator, eval_dataset={"a": good, "b": data} if several else data
        )
        if fine:
            assert check_trainer(trainer).eval_collator == type(collator).__name__
            continue
        with pytest.raises(MaskingError, match="evaluation rows") as caught:
            check_trainer(trainer)
        assert (caught.value.code, caught.value.row) == ("host_dataset", 0)


def test_a_stream_is_not_drawn_from(tokenizer: Any, tmp_path: Path) -> None:
    stream, report = mask_dataset(RAW.to_iterable_dataset(), PromptMasker(tokenizer))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=1)
    trainer = Trainer(
        model=model_of("llama", tokenizer),
        args=arguments,
        train_dataset=stream,
        data_collator=StrictPromptMaskingCollator(tokenizer),
    )
    assert check_trainer(trainer).rows is None
    with pytest.raises(MaskingError, match="stream") as caught:
        check_trainer(trainer, dataset=stream)
    assert caught.value.code == "bad_option"
    assert report.rows_in == 0


def test_the_check_draws_no_random_numbers(tokenizer: Any, tmp_path: Path) -> None:
    rows = masked(tokenizer)
    collator = StrictPromptMaskingCollator(tokenizer)
    trainer = trainer_of(tokenizer, tmp_path, "masked", model_of("llama", tokenizer), collator, eval_dataset=rows)
    before = torch.get_rng_state()
    check_trainer(trainer, dataset=rows)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_check_counts_no_dropped_row_that_training_will_count(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [user("Question"), assistant("")]}, *RAW.to_list()]
    collator = StrictPromptMaskingCollator(tokenizer, masker=PromptMasker(tokenizer, errors="drop"))
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
    trainer = Trainer(
        model_of("llama", tokenizer), arguments, train_dataset=Dataset.from_list(rows), data_collator=collator
    )
    check_trainer(trainer)
    assert not collator.dropped
    collator(rows)
    assert collator.dropped.total() == 1


# --- Unsloth: its trainer is TRL's, under another module; it never ran here, a stand-in of the same names does ----------


def unsloth_trainer(tokenizer: Any, tmp_path: Path, rows: Dataset, module: str, **changes: Any) -> Any:
    """TRL's trainer as Unsloth makes it: a class of its module, TRL's own collator, padding-free where that is on."""
    cls = type("UnslothSFTTrainer", (trl.SFTTrainer,), {"__module__": module})
    arguments = {"report_to": "none", "use_cpu": True, "bf16": False, "max_length": None, **changes}
    collator = arguments.pop("data_collator", None)
    return cls(
        model=model_of("llama", tokenizer),
        args=trl.SFTConfig(output_dir=str(tmp_path), **arguments),
        train_dataset=rows,
        data_collator=collator,
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("module", ["UnslothSFTTrainer", "unsloth.trainer"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_unsloths_own_collator_is_right_where_rows_come_out_of_it_as_they_are(
    module: str, padding_free: bool, tokenizer: Any, tmp_path: Path
) -> None:
    rows = masked(tokenizer)
    trainer = unsloth_trainer(tokenizer, tmp_path, rows, module, padding_free=padding_free)
    check = check_trainer(trainer, dataset=rows)
    assert check.train_collator == "DataCollatorForLanguageModeling"
    assert check.rows_compared == len(rows)


def test_a_collator_of_ours_in_unsloths_trainer_is_found(tokenizer: Any, tmp_path: Path) -> None:
    collator = StrictPromptMaskingCollator(tokenizer)
    trainer = unsloth_trainer(tokenizer, tmp_path, masked(tokenizer), "UnslothSFTTrainer", data_collator=collator)
    with pytest.raises(MaskingError, match="switches Unsloth's padding-free batches off") as caught:
        check_trainer(trainer)
    assert caught.value.code == "host_collator"


def test_labels_that_unsloths_batches_lose_are_found(tokenizer: Any, tmp_path: Path) -> None:
    """Rows without any, and a collator that takes the ids for labels."""
    trainer = unsloth_trainer(tokenizer, tmp_path, masked(tokenizer), "UnslothSFTTrainer")
    rows, trainer.train_dataset = trainer.train_dataset, trainer.train_dataset.remove_columns("labels")
    with pytest.raises(MaskingError, match="have no labels"):
        check_trainer(trainer)
    trainer.train_dataset = rows
    collate = trainer.data_collator

    def forgets(rows: Any) -> Any:
        batch = collate(rows)
        return {**batch, "labels": batch["input_ids"].clone()}

    trainer.data_collator = forgets
    with pytest.raises(MaskingError, match="entries of `labels` differ") as caught:
        check_trainer(trainer)
    assert caught.value.code == "host_dataset"


def test_a_module_whose_name_begins_alike_is_not_unsloths(tokenizer: Any, tmp_path: Path) -> None:
    trainer = unsloth_trainer(tokenizer, tmp_path, masked(tokenizer), "unsloth_like.trainer")
    with pytest.raises(MaskingError, match="collates with DataCollatorForLanguageModeling"):
        check_trainer(trainer)
