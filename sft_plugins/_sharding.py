"""Whether a model's weights are divided among processes."""

from __future__ import annotations

import sys

from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether no process holds all weights: FSDP of either version, or DeepSpeed's ZeRO-3. A forward gathers them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # unless it is loaded nothing is sharded by it
    kinds = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return any(isinstance(module, kinds) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )
