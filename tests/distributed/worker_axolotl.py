"""One rank of several `axolotl train` runs; writes down what each trained on, what came of it, and what should have.

    torchrun --standalone --nproc-per-node=2 worker_axolotl.py FOLDER plan.json [--shard [--deepspeed]]

`plan.json` is a list of `[name, path of a YAML]`. This is what `axolotl train --launcher torchrun` starts, one run after the
other in one process group.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from worker_script import is_sharded, shard_on_the_cpu

from testkit.ranks import leave_process_group

Document = tuple[list[int], list[int]]
"""Ids and labels."""


def documents_in(batch: dict[str, Any]) -> list[Document]:
    """The documents of a batch; the one that pads a packed row carries no loss and is left out."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "cu_seq_lens_q" in batch:
        pieces = [(ids[0, a:b], labels[0, a:b]) for a, b in pairwise(batch["cu_seq_lens_q"].tolist())]
    else:
        rows = zip(ids, labels, batch["attention_mask"] == 1, strict=True)
        pieces = [(row[real], label[real]) for row, label, real in rows]
    return [(row.tolist(), label.tolist()) for row, label in pieces if (label != -100).any()]


def in_row(row: dict[str, list[int]]) -> list[list[int]]:
    """Ids of each document of a packed row."""
    ends = [0, *accumulate(row["seq_lengths"])]
    return [row["input_ids"][a:b] for a, b in pairwise(ends)]


def by_hand(model: Any, steps: list[list[list[Document]]], rate: float) -> tuple[list[float], dict[str, list[float]]]:
    """One process, plain SGD, every document alone: losses of the steps, and the weights after them.

    A step's loss is the mean over ranks of the mean over the rank's supervised tokens: Axolotl does not average tokens
    across ranks (`average_tokens_across_devices` is always off).
    """
    losses = []
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for ranks in steps:
        loss = torch.zeros(())
        for documents in ranks:
            total = torch.zeros(())
            for ids, labels in documents:
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
                total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
            loss = loss + total / sum(label != -100 for _, labels in documents for label in labels[1:]) / len(ranks)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for weight, gradient in zip(weights.values(), gradients, strict=True):
                weight -= rate * gradient
        losses.append(float(loss))
    return losses, {name: p.flatten().tolist() for name, p in weights.items()}


def load_on_the_cpu() -> None:
    """Axolotl puts the model of rank r on accelerator r, whether or not there is one; nothing else here is changed."""
    from axolotl.loaders.model import ModelLoader

    own = ModelLoader._set_device_map_config

    def without_accelerator(self: Any) -> None:
        self.cfg.device_map = None
        own(self)

    ModelLoader._set_device_map_config = without_accelerator


def mesh_on_the_cpu() -> None:
    """Axolotl asks for a mesh of CUDA devices by name."""
    from accelerate.parallelism_config import ParallelismConfig

    own = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, _: own(self, "cpu")


def whole(parameter: Any) -> torch.Tensor:
    return (parameter.full_tensor() if is_sharded(parameter) else parameter).detach()


@torch.no_grad()
def begin_alike(twin: Any, model: Any) -> None:
    weights = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        parameter.copy_(whole(weights[name]))


def train(path: str, seen: dict[str, Any]) -> None:
    import axolotl.train
    from axolotl.cli.train import do_cli

    execute = axolotl.train.execute_training

    def observed(cfg: Any, trainer: Any, resume: Any) -> None:
        twin = copy.deepcopy(trainer.model)
        step = trainer.training_step
        batches: list[list[Document]] = []
        seen["losses"] = []

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if (
                not batches
            ):  # every rank drew an adapter of its own: what trains is rank 0's (DDP), or shards of each (FSDP2)
                begin_alike(twin, trainer.model)
            batches.append(documents_in(inputs))
            loss = step(model, inputs, *args, **kwargs)
            seen["losses"].append(float(loss))
            return loss

        trainer.training_step = training_step
        execute(cfg, trainer, resume)
        everyones: list[Any] = [None] * trainer.args.world_size
        torch.distributed.all_gather_object(everyones, batches)
        steps = [list(ranks) for ranks in zip(*everyones, strict=True)]
        seen["expected losses"], seen["expected weights"] = by_hand(twin, steps, cfg.learning_rate)
        weights = {n: whole(p) for n, p in trainer.model.named_parameters() if p.requires_grad}
        seen["weights"] = {name: weight.flatten().tolist() for name, weight in weights.items()}
        seen["seen"] = [[ids for ids, _ in documents] for documents in batches]
        seen["world"] = trainer.args.world_size
        if "seq_lengths" in trainer.train_dataset.column_names:
            seen["rows"] = [in_row(row) for row in trainer.train_dataset]
        seen["steps"] = trainer.state.global_step
        seen["logged"] = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        seen["sharded"] = sum(map(is_sharded, trainer.model.parameters()))
        seen["parameters"] = len(list(trainer.model.parameters()))
        seen["parallel"] = type(trainer.model_wrapped).__name__

    axolotl.train.execute_training = observed
    try:
        do_cli(path)
    finally:
        axolotl.train.execute_training = execute


def main() -> None:
    folder, plan = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    if "--deepspeed" in sys.argv:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # Axolotl sets it too, later
    if "--shard" in sys.argv:
        shard_on_the_cpu()
        mesh_on_the_cpu()
    sys.argv = sys.argv[:1]  # Axolotl's commands parse what is left
    load_on_the_cpu()
    # Axolotl takes the process group down after a run; the next run needs it.
    torch.distributed.destroy_process_group = lambda *args, **kwargs: None
    found: dict[str, Any] = {}
    for name, path in plan:
        seen: dict[str, Any] = {"error": None}
        try:
            train(path, seen)
        except Exception:
            seen["error"] = traceback.format_exc()
        found[name] = seen
        (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


# Axolotl saves prepared rows from a pool of spawned processes.
if __name__ == "__main__":
    main()
    leave_process_group()
