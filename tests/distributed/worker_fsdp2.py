"""One rank of packed forwards and backwards through models sharded by FSDP2 (`fully_shard`), on the CPU.

    torchrun --standalone --nproc-per-node=2 worker_fsdp2.py FOLDER

Every rank has documents of its own, as many as it likes. The oracle is an unsharded twin on each document alone; its loss is
the mean over ranks of each rank's mean over supervised tokens, which is what FSDP's averaged gradients are of.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedTokenizerFast

from sft_plugins import BlockDiagonalPackingCollator, isolate
from sft_plugins.errors import ContaminationError
from testkit.isolation_oracle import make_documents
from testkit.tiny_models import VOCAB, build

LENGTHS = [[5, 9, 2, 17], [3, 12, 4, 7, 7, 2]]
"""Documents of each rank."""


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({"</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


def rows(rank: int) -> list[dict[str, list[int]]]:
    made = []
    for ids in make_documents(LENGTHS[rank], VOCAB, seed=rank):
        labels = ids.clone()
        labels[: max(1, len(ids) // 3)] = -100
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


def tiny(name: str, *, lora: bool) -> Any:
    model = build(name).model
    if not lora:
        return model
    torch.manual_seed(0)
    options = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, options)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [
        child for m in model.modules() if isinstance(m, nn.ModuleList) for child in m if "Layer" in type(child).__name__
    ]


def shard(model: nn.Module, *, checkpointing: bool) -> None:
    """Every layer, then the rest, as accelerate does."""
    if checkpointing:
        kinds = tuple({type(layer) for layer in layers_of(model)})
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kinds))
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)


def run(
    name: str, *, when: str, lora: bool = False, backend: str = "auto", checkpointing: bool = False
) -> dict[str, Any]:
    rank = dist.get_rank()
    model = tiny(name, lora=lora)
    if when == "before":
        isolate(model, backend=backend)
    shard(model, checkpointing=checkpointing)
    if when == "after":
        isolate(model, backend=backend)
    collator = BlockDiagonalPackingCollator(tokenizer(), model=model, rows="documents")
    model.train()
    loss = model(**collator(rows(rank))).loss
    loss.backward()
    sharded = [p for p in model.parameters() if type(p).__name__ == "DTensor"]
    gradients = {
        n.replace("_checkpoint_wrapped_module.", ""): p.grad.full_tensor()
        for n, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    expected_losses, expected = alone(tiny(name, lora=lora))
    gaps = {
        n: float((gradients[n] - e).abs().max() / e.abs().max().clamp_min(1e-9))
        for n, e in expected.items()
        if e.abs().max() > 1e-6
    }
    return {
        "backend": collator.isolation.backend,
        "leaked": collator.isolation.leaked,
        "sharded": len(sharded),
        "parameters": len(list(model.parameters())),
        "loss": float(loss),
        "expected loss": expected_losses[rank],
        "same parameters": sorted(gradients) == sorted(expected),
        "compared": len(gaps),
        "worst gradient": max(gaps.values()),
    }


def alone(model: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    model.train()
    losses = []
    for rank in range(len(LENGTHS)):
        total, count = torch.zeros(()), 0
        for row in rows(rank):
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        losses.append(total / count)
    (sum(losses) / len(losses)).backward()
    return [float(x) for x in losses], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def without_padding() -> dict[str, Any]:
    """A decoder that cannot be padded, isolated and then sharded: how many calls a rank makes depends on its documents."""
    model = tiny("prophetnet", lora=False)
    collator = BlockDiagonalPackingCollator(tokenizer(), model=model, rows="documents")
    shard(model, checkpointing=False)
    try:
        model(**collator(rows(dist.get_rank())))
    except ContaminationError as error:
        return {"error": str(error), "code": error.code}
    return {"error": None}


def beneath_the_root() -> dict[str, Any]:
    """The causal LM inside the sharded PEFT model, given alone; and then training through the root."""
    model = tiny("llama", lora=True)
    shard(model, checkpointing=False)
    try:
        isolate(model.get_base_model())
    except ContaminationError as error:
        model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
        return {"error": str(error), "code": error.code}
    return {"error": None}


RUNS: dict[str, dict[str, Any]] = {
    "llama, isolated before": {"name": "llama", "when": "before"},
    "llama, isolated after": {"name": "llama", "when": "after"},
    "gpt_oss, isolated before": {"name": "gpt_oss", "when": "before"},
    "gpt_oss, isolated after": {"name": "gpt_oss", "when": "after"},
    "llama, lora, isolated before": {"name": "llama", "when": "before", "lora": True},
    "llama, lora, isolated after": {"name": "llama", "when": "after", "lora": True},
    "llama, lora, checkpointing": {"name": "llama", "when": "before", "lora": True, "checkpointing": True},
    "llama, unpack": {"name": "llama", "when": "before", "backend": "unpack"},
    "mamba, isolated before": {"name": "mamba", "when": "before"},
}


def main() -> None:
    dist.init_process_group("gloo")
    found = {name: run(**options) for name, options in RUNS.items()}
    found["without padding"] = without_padding()
    found["beneath the root"] = beneath_the_root()
    (Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
