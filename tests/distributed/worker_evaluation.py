"""One rank of `SFTTrainer.evaluate` on masked and packed rows; writes down the losses it reports, and those of documents alone.

torchrun --standalone --nproc-per-node=2 worker_evaluation.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import trl
from worker_trl import arguments, documents, documents_of, masked, packed, tokenizer

from sft_plugins import BlockDiagonalPackingCollator, StrictPromptMaskingCollator
from sft_plugins.integrations.trl import sft_arguments
from sft_plugins.packing import even_rows
from testkit.ranks import leave_process_group
from testkit.tiny_models import build

COUNT = 80
ROWS = {
    "masked": lambda: masked(40),
    "masked, uneven": lambda: masked(41),
    "packed": lambda: even_rows(packed(COUNT), 4),
    "packed, uneven": lambda: packed(COUNT),
}


def alone() -> list[tuple[float, int]]:
    """Sum of losses and number of supervised tokens of each document, run alone."""
    model, found = build("llama").model, []
    for row in documents(COUNT):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        found.append((float(F.cross_entropy(logits, labels, reduction="sum")), int((labels != -100).sum())))
    return found


def evaluate(folder: Path, rows: datasets.Dataset, batch: int) -> float:
    model = build("llama").model
    is_packed = "seq_lengths" in rows.column_names
    collator: Any = (
        BlockDiagonalPackingCollator(tokenizer(), model=model)
        if is_packed
        else StrictPromptMaskingCollator(tokenizer())
    )
    own = {**arguments(), **sft_arguments("packed" if is_packed else "masked"), "per_device_eval_batch_size": batch}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(folder), **own),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
        processing_class=tokenizer(),
    )
    return float(trainer.evaluate()["eval_loss"])


def main(folder: Path) -> None:
    found: dict[str, Any] = {"alone": alone()}
    for name, make in ROWS.items():
        rows = make()
        is_packed = "seq_lengths" in rows.column_names
        whole = rows if is_packed else ({**row, "seq_lengths": [len(row["input_ids"])]} for row in rows)
        numbers = [[number for number, _ in documents_of(row)] for row in whole]
        losses = {batch: evaluate(folder / "out", rows, batch) for batch in (1, 2)}
        found[name] = {"rows": numbers, "losses": losses}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process_group()
