"""Runs Axolotl's own commands on a list of YAMLs, one after the other in one process, and writes down what it saw.

    python drive_axolotl.py plan.json seen.json

`plan.json` is a list of `[name, command, path of a YAML]`, the commands being `train`, `preprocess`, `evaluate`, `rows`,
`inference` and `merge_lora`. In `train`, the built trainer is looked at between its construction and its first step. A
process of its own: Axolotl patches transformers for good.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F


def look(trainer: Any, loader: Any) -> dict[str, Any]:
    """What the live data loader feeds the model: collator, documents of every batch, loss of the batch, of its documents
    run alone, and of its rows read as one document each (sums over supervised tokens, all three).
    """
    model, collator = trainer.model, loader.collate_fn
    inner = getattr(collator, "collator", collator)
    batches, together, alone, as_one, tokens = [], 0.0, 0.0, 0.0, 0
    model.eval()
    with torch.no_grad():
        for batch in loader:
            documents = split(batch)
            batches.append([[ids.tolist(), labels.tolist()] for ids, labels in documents])
            count = sum(int((labels[1:] != -100).sum()) for _, labels in documents)
            output = model(**batch)
            together += float(output.loss) * count
            positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
            one = {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": positions}
            as_one += float(model(**one).loss) * count
            tokens += count
            for ids, labels in documents:
                if (labels != -100).any():
                    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
                    alone += float(F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
    model.train()
    return {
        "collator": type(inner).__name__,
        "keys": sorted(batch),
        "batches": batches,
        "together": together / tokens,
        "alone": alone / tokens,
        "as one": as_one / tokens,
    }


def split(batch: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`(ids, labels)` of every document, without padding."""
    if "cu_seq_lens_q" in batch:
        ends = batch["cu_seq_lens_q"].tolist()
        pieces = [(batch["input_ids"][0, a:b], batch["labels"][0, a:b]) for a, b in pairwise(ends)]
        if "seq_parents" in batch:  # of trees each branch with the path that it stands for, which others train
            whole: list[tuple[torch.Tensor, torch.Tensor]] = []
            branches = zip(pieces, batch["seq_depths"].tolist(), batch["seq_parents"].tolist(), strict=True)
            for (ids, labels), depth, parent in branches:
                before = whole[parent][0][:depth] if parent >= 0 else ids[:0]
                whole.append((torch.cat([before, ids]), torch.cat([torch.full_like(before, -100), labels])))
            pieces = whole
        return [(ids, labels) for ids, labels in pieces if (labels != -100).any()]
    if "position_ids" in batch:  # Axolotl's own packed rows: positions restart with every document
        pieces = []
        for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
            ends = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            pieces += [(ids[a:b], labels[a:b]) for a, b in pairwise(ends)]
        return [(ids, labels) for ids, labels in pieces if (labels != -100).any()]
    return [
        (ids[mask == 1], labels[mask == 1])
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]


def train(path: str, seen: dict[str, Any]) -> None:
    import axolotl.train
    from axolotl.cli.train import do_cli

    execute = axolotl.train.execute_training

    def observed(cfg: Any, trainer: Any, resume: Any) -> None:
        seen["prepared_path"] = cfg.dataset_prepared_path
        seen["attention"] = trainer.model.config._attn_implementation
        seen["train"] = look(trainer, trainer.get_train_dataloader())
        if trainer.eval_dataset is not None:
            seen["evaluation"] = look(trainer, trainer.get_eval_dataloader())
        seen["callbacks"] = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
        seen["rows"] = len(trainer.train_dataset)
        torch.manual_seed(0)
        execute(cfg, trainer, resume)
        seen["steps"] = trainer.state.global_step
        seen["max_steps"] = trainer.state.max_steps
        seen["history"] = trainer.state.log_history

    axolotl.train.execute_training = observed
    try:
        do_cli(path)
    finally:
        axolotl.train.execute_training = execute


def preprocess(path: str, seen: dict[str, Any]) -> None:
    from axolotl.cli.preprocess import do_cli

    try:
        do_cli(path)
    finally:
        os.environ.pop("AXOLOTL_IS_PREPROCESS", None)


def evaluate(path: str, seen: dict[str, Any]) -> None:
    import axolotl.evaluate
    from axolotl.cli.evaluate import do_cli

    setup = axolotl.evaluate.setup_trainer

    def observed(**kwargs: Any) -> Any:
        trainer = setup(**kwargs)
        seen["evaluation"] = look(trainer, trainer.get_eval_dataloader())
        seen["callbacks"] = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
        return trainer

    axolotl.evaluate.setup_trainer = observed
    try:
        do_cli(path)
    finally:
        axolotl.evaluate.setup_trainer = setup


def rows(path: str, seen: dict[str, Any]) -> None:
    """Only the rows that training would start from, audited and packed."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import PluginManager

    cfg = load_cfg(path)
    meta = PluginManager.get_instance().load_datasets(cfg) or load_datasets(cfg=cfg)
    seen["prepared_path"] = cfg.dataset_prepared_path
    seen["total_num_steps"] = meta.total_num_steps
    seen["rows"] = [dict(row) for row in meta.train_dataset]


def inference(path: str, seen: dict[str, Any]) -> None:
    """One question, as a user types it, and three tokens of an answer."""
    import axolotl.cli.inference as cli

    settings, typed = cli.GenerationConfig, sys.stdin
    cli.GenerationConfig = lambda **options: settings(**{**options, "max_new_tokens": 3})
    sys.stdin = io.StringIO("Hello\n")  # its end is the end of the session
    try:
        cli.do_cli(path)
    finally:
        cli.GenerationConfig, sys.stdin = settings, typed


def merge_lora(path: str, seen: dict[str, Any]) -> None:
    from axolotl.cli.merge_lora import do_cli

    do_cli(path)


def save_without_a_pool() -> None:
    """Axolotl saves a few rows through one spawned process, which takes five seconds to start, twenty times over."""
    from datasets import Dataset

    save = Dataset.save_to_disk
    Dataset.save_to_disk = lambda self, *args, num_proc=None, **options: save(self, *args, **options)


def main() -> None:
    plan, results, target = json.loads(Path(sys.argv[1]).read_text()), {}, Path(sys.argv[2])
    commands = {
        "train": train, "preprocess": preprocess, "evaluate": evaluate, "rows": rows, "inference": inference,
        "merge_lora": merge_lora,
    }  # fmt: skip
    save_without_a_pool()
    sys.argv = sys.argv[:1]  # Axolotl's commands parse what is left
    for name, command, path in plan:
        seen: dict[str, Any] = {"error": None}
        text = io.StringIO()
        handler = logging.StreamHandler(text)
        ours = logging.getLogger("axolotl")
        ours.addHandler(handler)
        try:
            with contextlib.redirect_stdout(text):
                commands[command](path, seen)
        except Exception as error:
            seen["error"] = f"{type(error).__name__}: {error}"
            seen["traceback"] = traceback.format_exc()
        finally:
            ours.removeHandler(handler)
        seen["log"] = text.getvalue()
        results[name] = seen
        target.write_text(json.dumps(results, default=float))


# Axolotl saves prepared rows from a pool of spawned processes.
if __name__ == "__main__":
    main()
