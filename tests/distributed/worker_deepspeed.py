"""One rank of packed forwards and backwards through DeepSpeed engines, ZeRO-2 and ZeRO-3, on the CPU.

    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node=2 worker_deepspeed.py FOLDER

Documents and oracle are those of `worker_fsdp2`: an unsharded twin on each document alone. Parameters are partitioned
however small they are; by default DeepSpeed keeps those below 100,000 elements whole.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from worker_fsdp2 import alone, rows, tiny, tokenizer

from sft_plugins import BlockDiagonalPackingCollator, isolate
from sft_plugins.errors import ContaminationError

RATE = 0.1


def engine_of(model: Any, stage: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=RATE), config=config)[0]


def is_partitioned(parameter: Any) -> bool:
    return getattr(parameter, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE


def run(name: str, *, stage: int, lora: bool = False, backend: str = "auto") -> dict[str, Any]:
    rank = dist.get_rank()
    model = tiny(name, lora=lora)
    isolate(model, backend=backend)
    collator = BlockDiagonalPackingCollator(tokenizer(), model=model, rows="documents")
    engine = engine_of(model, stage)
    partitioned = sum(map(is_partitioned, model.parameters()))
    loss = engine(**collator(rows(rank))).loss
    engine.backward(loss)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = {n: deepspeed.utils.safe_get_full_grad(p) for n, p in trained.items()}
    engine.step()
    weights = {n: deepspeed.utils.safe_get_full_fp32_param(p) for n, p in trained.items()}

    twin = tiny(name, lora=lora)
    expected_losses, expected = alone(twin)
    before = dict(twin.named_parameters())
    return {
        "backend": collator.isolation.backend,
        "partitioned": partitioned,
        "parameters": len(list(model.parameters())),
        "loss": float(loss),
        "expected loss": expected_losses[rank],
        "same parameters": sorted(gradients) == sorted(expected),
        "compared": sum(bool(e.abs().max() > 1e-6) for e in expected.values()),
        "worst gradient": max(
            float((gradients[n] - e).abs().max() / e.abs().max()) for n, e in expected.items() if e.abs().max() > 1e-6
        ),
        "worst weight": max(
            float((weights[n] - (before[n].detach() - RATE * e)).abs().max()) for n, e in expected.items()
        ),
    }


def partitioned_before() -> dict[str, Any]:
    """A model that is given to `isolate` when DeepSpeed has taken its weights apart."""
    try:
        isolate(engine_of(tiny("llama", lora=True), 3))
    except ContaminationError as error:
        return {"error": str(error), "code": error.code}
    return {"error": None}


def without_padding() -> dict[str, Any]:
    """A decoder that cannot be padded: how many calls a rank makes depends on its documents."""
    model = tiny("prophetnet", lora=False)
    collator = BlockDiagonalPackingCollator(tokenizer(), model=model, rows="documents")
    engine = engine_of(model, 3)
    try:
        engine(**collator(rows(dist.get_rank())))
    except ContaminationError as error:
        return {"error": str(error), "code": error.code}
    return {"error": None}


RUNS: dict[str, dict[str, Any]] = {
    "llama, stage 2": {"name": "llama", "stage": 2},
    "llama, lora, stage 2": {"name": "llama", "stage": 2, "lora": True},
    "mamba, stage 2": {"name": "mamba", "stage": 2},
    "llama, stage 3": {"name": "llama", "stage": 3},
    "llama, lora, stage 3": {"name": "llama", "stage": 3, "lora": True},
    "gpt_oss, lora, stage 3": {"name": "gpt_oss", "stage": 3, "lora": True},
    "llama, unpack, stage 3": {"name": "llama", "stage": 3, "backend": "unpack"},
    "mamba, stage 3": {"name": "mamba", "stage": 3},
}


def main() -> None:
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    found = {name: run(**options) for name, options in RUNS.items()}
    found["partitioned before"] = partitioned_before()
    found["without padding"] = without_padding()
    (Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
