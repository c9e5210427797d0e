"""Runs LLaMA-Factory on a list of jobs, in its own environment, and writes down what it saw. Nothing of sft-plugins is there.

    python drive_llamafactory.py jobs.json seen.json

`jobs.json` is a list of `{"name": …, "train": configuration}`, of which every batch of the live data loader is kept, and of
`{"name": …, "model": folder, "template": …, "formatting": …, "rows": conversations}`, of which its own ids and labels are.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.data.converter import align_dataset
from llamafactory.data.parser import DatasetAttr
from llamafactory.data.processor import SupervisedDatasetProcessor
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback


class Look(TrainerCallback):
    """The batches of an epoch, before the first step, and the loss of each beside that of its rows alone."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.losses: list[list[float]] = []
        self.keys: list[str] = []
        self.collator = ""
        self.steps = 0

    def on_train_begin(self, *_: Any, model: Any = None, train_dataloader: Any = None, **__: Any) -> None:
        model.eval()
        for batch in train_dataloader:
            self.keys = sorted(batch)
            lengths = batch["attention_mask"].sum(1).tolist()
            rows = [
                (ids[:n], labels[:n])
                for ids, labels, n in zip(batch["input_ids"], batch["labels"], lengths, strict=True)
            ]
            loss_outside = sum(
                int((labels[n:] != -100).sum()) for labels, n in zip(batch["labels"], lengths, strict=True)
            )
            self.batches.append([[ids.tolist(), labels.tolist()] for ids, labels in rows])
            with torch.no_grad():
                loss = float(model(**batch).loss)
                alone = [
                    F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:], reduction="sum")
                    for ids, labels in rows
                ]
            tokens = sum(int((labels[1:] != -100).sum()) for _, labels in rows)
            self.losses.append([loss, float(sum(alone)) / tokens, loss_outside])
        self.collator = type(train_dataloader.collate_fn).__name__
        model.train()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def train(job: dict[str, Any]) -> dict[str, Any]:
    look = Look()
    run_exp(job["train"], callbacks=[look])
    return vars(look)


def own_labels(job: dict[str, Any]) -> dict[str, Any]:
    """Of each conversation the row that LLaMA-Factory makes, None where it drops it, or the error in a word."""
    options = {
        "stage": "sft", "do_train": True, "model_name_or_path": job["model"], "template": job["template"], "dataset": "unused",
        "finetuning_type": "lora", "output_dir": str(Path(job["model"]) / "out"), "use_cpu": True, "cutoff_len": 1_000_000,
    }  # fmt: skip
    model_args, data_args, training_args, _, _ = get_train_args(options)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    processor = SupervisedDatasetProcessor(template=template, tokenizer=tokenizer, processor=None, data_args=data_args)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
            "observation_tag": "tool", "function_tag": "function", "system_tag": "system"}  # fmt: skip
    made: list[Any] = []
    for row in job["rows"]:
        attr = DatasetAttr("file", dataset_name="row", formatting=job["formatting"], messages="messages", **tags)
        if row.get("tools"):
            attr.tools = "tools"
            row = {**row, "tools": json.dumps(row["tools"])}
        try:
            aligned = align_dataset(Dataset.from_list([row]), attr, data_args, training_args)
            encoded = processor.preprocess_dataset(aligned[:])
        except Exception as error:  # whatever it says of a row that it cannot read
            made.append(type(error).__name__)
            continue
        rows = list(zip(encoded["input_ids"], encoded["labels"], strict=True)) if encoded else []
        made.append(rows[0] if rows else None)
    return {"rows": made}


def main() -> None:
    jobs, target = (Path(argument) for argument in sys.argv[1:])
    seen = {}
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        logging.info("job %s", job["name"])
        try:
            seen[job["name"]] = train(job) if "train" in job else own_labels(job)
        except Exception as error:
            traceback.print_exc()
            seen[job["name"]] = {"error": f"{type(error).__name__}: {error}"}
        target.write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
