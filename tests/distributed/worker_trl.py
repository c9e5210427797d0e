"""One rank of several short runs through TRL's `SFTTrainer`; writes down what it trained on, and what came of it.

    torchrun --standalone --nproc-per-node=2 worker_trl.py FOLDER

The global batch is 4 rows whatever the number of processes. Documents are known by their first token.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import trl
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from sft_plugins import BlockDiagonalPackingCollator, StrictPromptMaskingCollator, isolate, pack_dataset, pack_stream
from sft_plugins.integrations.trl import check_trainer, sft_arguments
from sft_plugins.packing import RowCost, check_dealing, deal_rows, even_rows
from testkit.ranks import leave_process_group
from testkit.tiny_models import VOCAB, build

GLOBAL_BATCH = 4
FIRST = 4
"""First token of document 0; the ids below are special."""
WORLD = int(os.environ["WORLD_SIZE"])


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(FIRST, VOCAB)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def documents(count: int) -> list[dict[str, list[int]]]:
    """Documents of 3 to 14 tokens, the first of which says which document it is; about a third is prompt."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        ids = [FIRST + number, *rng.integers(FIRST, VOCAB, rng.integers(2, 14)).tolist()]
        prompt = 1 + len(ids) // 3
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def masked(count: int) -> datasets.Dataset:
    return datasets.Dataset.from_list(documents(count))


def packed(count: int) -> datasets.Dataset:
    return pack_dataset(masked(count), 24, seed=0).dataset


def trees(count: int) -> datasets.Dataset:
    """Rows of trees: of `count` conversations two rows each, which begin with 20 tokens of their own."""
    rng, rows = np.random.default_rng(1), []
    for number in range(count):
        history = [FIRST + number, *rng.integers(FIRST, VOCAB, 19).tolist()]
        for ids in rng.integers(FIRST, VOCAB, (2, 4)).tolist():
            rows.append({"input_ids": history + ids, "labels": [-100] * len(history) + ids})
    folded, report = pack_dataset(datasets.Dataset.from_list(rows), 60, seed=0, share_prefixes=True)
    assert report.prefixes is not None
    assert report.prefixes.trees == count
    return even_rows(folded, GLOBAL_BATCH)


def streamed(count: int) -> datasets.IterableDataset:
    """A packed stream as `SFTTrainer` takes it."""
    stream = pack_stream(documents(count), 24, buffer_size=30)
    return datasets.IterableDataset.from_generator(lambda: iter(stream))


def documents_of(row: dict[str, list[int]]) -> list[tuple[int, int]]:
    """Number and length of each document of a packed row."""
    starts = accumulate(row["seq_lengths"][:-1], initial=0)
    return [(row["input_ids"][start] - FIRST, length) for start, length in zip(starts, row["seq_lengths"], strict=True)]


class Observing:
    """Keeps the documents and the loss of every micro-batch that is trained on."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen = self.__dict__.setdefault("seen", [])
        losses = self.__dict__.setdefault("losses", [])
        ids = inputs["input_ids"]
        firsts = ids[0, inputs["cu_seq_lens_q"][:-1].long()] if "cu_seq_lens_q" in inputs else ids[:, 0]
        seen.append((firsts - FIRST).tolist())
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        losses.append(float(loss))
        return loss


class ObservedSFT(Observing, trl.SFTTrainer):
    """`SFTTrainer`, observed."""


class Observed(Observing, Trainer):
    """`transformers.Trainer`, observed."""


def arguments(accumulation: int = 1) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": GLOBAL_BATCH // WORLD // accumulation,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        # Plain SGD: a weight moves by its gradient. Adam would blow up rounding where a gradient is all but zero.
        "optim": "sgd",
        "learning_rate": 0.1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }


def train(
    folder: Path,
    name: str,
    rows: Any,
    *,
    backend: str = "auto",
    accumulation: int = 1,
    dropout: float = 0.0,
    resume: Path | None = None,
    dealt: Any = None,
    **changes: Any,
) -> dict[str, Any]:
    """A tiny model of architecture `name` with LoRA, trained on `rows`; `dealt` is what `deal_rows` reported of them."""
    model = build(name).model
    is_masked = isinstance(rows, datasets.Dataset) and "seq_lengths" not in rows.column_names
    if is_masked:
        collator: Any = StrictPromptMaskingCollator(tokenizer())
    else:
        isolate(model, backend=backend)
        collator = BlockDiagonalPackingCollator(tokenizer(), model=model)
    torch.manual_seed(0)
    trainer = ObservedSFT(
        model=model,
        args=trl.SFTConfig(
            str(folder), **{**arguments(accumulation), **sft_arguments("masked" if is_masked else "packed"), **changes}
        ),
        train_dataset=rows,
        data_collator=collator,
        processing_class=tokenizer(),
        peft_config=LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=dropout, init_lora_weights=False
        ),
    )
    check_trainer(trainer)
    if dealt is not None:
        check_dealing(trainer, dealt)
    start(trainer, resume)
    return outcome(trainer)


def start(trainer: Any, checkpoint: Path | None) -> None:
    # transformers 5.16 loads the optimizer onto "cpu:0", the device of a rank on the CPU, which torch.load does not know.
    trainer.args.__dict__["_setup_devices"] = torch.device("cpu")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def outcome(trainer: Any) -> dict[str, Any]:
    logged = trainer.state.log_history
    return {
        "world": trainer.args.world_size,
        "steps": trainer.state.global_step,
        "seen": trainer.seen,
        "losses": trainer.losses,
        "logged": [record["loss"] for record in logged if "loss" in record],
        "weights": {n: p.detach().flatten().tolist() for n, p in trainer.model.named_parameters() if p.requires_grad},
        "parallel": type(trainer.model_wrapped).__name__,
    }


def plain_stream(folder: Path, *, resume: Path | None = None, **changes: Any) -> dict[str, Any]:
    """`transformers.Trainer` on a `PackStream` as it is."""
    model = build("llama").model
    collator = BlockDiagonalPackingCollator(tokenizer(), model=model)
    trainer = Observed(
        model=model,
        args=TrainingArguments(str(folder), **{**arguments(), **changes}, max_steps=6),
        train_dataset=pack_stream(documents(80), 24, buffer_size=30),
        data_collator=collator,
    )
    try:
        start(trainer, resume)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return outcome(trainer)


def runs(folder: Path) -> dict[str, Any]:
    rows = packed(80)
    even = even_rows(rows, GLOBAL_BATCH)
    found: dict[str, Any] = {"rows": len(rows), "even rows": len(even)}
    found["masked"] = train(folder / "masked", "llama", masked(40), num_train_epochs=2)
    found["masked, uneven"] = train(folder / "masked-uneven", "llama", masked(41))
    found["packed, uneven"] = train(folder / "packed-uneven", "opt", rows)
    found["packed"] = train(folder / "packed", "opt", even, num_train_epochs=2)
    found["packed, accumulated"] = train(folder / "accumulated", "gemma2", even, accumulation=2)
    found["trees"] = train(folder / "trees", "gemma2", trees(24), accumulation=2)
    found["unpack"] = train(folder / "unpack", "llama", even, backend="unpack")

    dealt, report = deal_rows(even, ranks=WORLD, batch_size=2, accumulation=2, cost=RowCost(linear=5, quadratic=1))
    found["dealt rows"] = [documents_of(row) for row in dealt]
    found["dealt report"] = report.to_dict()
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    found["dealt"] = train(folder / "dealt", "llama", dealt, dealt=report, **size, train_sampling_strategy="sequential")

    saved = folder / "saved"
    changes = {"num_train_epochs": 2, "dropout": 0.1, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3}
    found["unbroken"] = train(saved, "llama", even, **changes)
    changes["save_strategy"] = "no"
    found["resumed"] = train(folder / "resumed", "llama", even, resume=saved / "checkpoint-9", **changes)

    found["stream"] = train(folder / "stream", "llama", streamed(80), max_steps=7)
    kept = {"remove_unused_columns": False}
    own = {"accelerator_config": {"dispatch_batches": False}}
    found["plain stream"] = plain_stream(folder / "plain", **kept, **own, save_strategy="steps", save_steps=4)
    found["plain stream, resumed"] = plain_stream(folder / "again", **kept, **own, resume=folder / "plain/checkpoint-4")
    found["plain stream, pruned"] = plain_stream(folder / "pruned", **own)
    found["plain stream, dispatched"] = plain_stream(folder / "dispatched", **kept)
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / f"rank{os.environ['RANK']}.json").write_text(json.dumps(runs(target / "out")))
    leave_process_group()
