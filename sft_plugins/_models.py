"""Which module is the causal LM inside PEFT, DDP and compile wrappers, what cannot be isolated at all, and how weights lie."""

from __future__ import annotations

import os
import sys

import torch
from torch import nn

from sft_plugins.errors import ContaminationError

_CONTEXT_PARALLEL = ("PARALLELISM_CONFIG_CP_SIZE", "PARALLELISM_CONFIG_SP_SIZE")


def causal_lm_of(model: nn.Module) -> nn.Module:
    """The causal language model inside `model`.

    Raises:
        ContaminationError: `not_causal_lm`, `meta_device`, `prompt_learning`, `row_adapter`, `sharded`,
            `data_parallel` or `context_parallel`, each of which makes packed rows inexact or the probe impossible.
    """
    refuse_context_parallel()
    if not isinstance(model, nn.Module):
        raise _refusal(f"expected a torch model, got {type(model).__name__}", "not_causal_lm", "pass the model")
    lm = _unwrap(model)
    config = getattr(lm, "config", None)
    head = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if config is None or head is None or getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "no model with an LM head"
        raise _refusal(
            f"{type(lm).__name__} is {kind}, so it is no causal language model",
            "not_causal_lm",
            "load it with AutoModelForCausalLM",
        )
    for name, parameter in lm.named_parameters():
        if parameter.is_meta:
            raise _refusal(
                f"parameter {name} is on the meta device", "meta_device", "load the weights before isolating the model"
            )
        if hasattr(parameter, "ds_id") and parameter.numel() == 0:
            raise _refusal(
                f"parameter {name} is partitioned by DeepSpeed ZeRO-3",
                "sharded",
                "{whole_weights:isolate the model before it is partitioned}",
            )
    return lm


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if type(model).__name__ == "FullyShardedDataParallel":
            raise _refusal(
                "the model is wrapped in FSDP", "sharded", "{no_wrapping:isolate the model before the trainer wraps it}"
            )
        if isinstance(model, nn.DataParallel):
            raise _refusal(
                "the model is wrapped in nn.DataParallel, whose replicas share one forward",
                "data_parallel",
                "start one process per device (DDP), or set CUDA_VISIBLE_DEVICES to one",
            )
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            for name, config in model.peft_config.items():
                _refuse_adapter(name, config)
            model = model.get_base_model()
        else:
            return model


def _refuse_adapter(name: str, config: object) -> None:
    """Raise for an adapter that makes something of the whole row, before the causal LM is called."""
    where, remedy = (
        f"adapter {name!r} ({type(config).__name__})",
        "{no_packing_or_lora:train without packing, or with LoRA}",
    )
    if getattr(config, "is_prompt_learning", False):
        what = "puts virtual tokens before the row, where only its first document sees them"
        raise _refusal(f"{where} {what}", "prompt_learning", remedy)
    what = ""
    if getattr(config, "alora_invocation_tokens", None):
        what = "begins where its invocation tokens stand last in the row, so that it is off for all documents before"
    elif str(getattr(config, "peft_type", "")).upper().endswith("XLORA"):
        what = "weighs its adapters in a forward of its own over the row, which no proof here covers"
    if what:
        raise _refusal(f"{where} {what}", "row_adapter", remedy)


def refuse_context_parallel() -> None:
    """Raise where a row is split over ranks: boundaries count whole rows, and the mask is dropped on the way.

    Raises:
        ContaminationError: `context_parallel`.
    """
    sizes = {name: os.environ.get(name, "1") for name in _CONTEXT_PARALLEL}
    if (state := sys.modules.get("accelerate.state")) is not None:
        parallelism = state.AcceleratorState._shared_state.get("parallelism_config")
        for name in ("cp_size", "sp_size"):
            sizes[name] = str(getattr(parallelism, name, None) or 1)
    if split := {name: size for name, size in sizes.items() if size not in ("", "1")}:
        raise _refusal(
            f"context or sequence parallelism is on ({', '.join(f'{k}={v}' for k, v in split.items())})",
            "context_parallel",
            "{whole_rows:train packed rows with cp_size=1 and sp_size=1}",
        )


def lowest_precision(model: nn.Module) -> torch.dtype:
    """The coarsest type the model computes in: quantised weights count as bfloat16."""
    types = {parameter.dtype for parameter in model.parameters()}
    if any(not dtype.is_floating_point or torch.finfo(dtype).bits < 16 for dtype in types):
        return torch.bfloat16
    return max(types, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def is_sharded(model: nn.Module) -> bool:
    """Whether no process holds all weights: FSDP of either version, or DeepSpeed's ZeRO-3. A forward gathers them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # unless it is loaded nothing is sharded by it
    kinds = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return any(isinstance(module, kinds) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


def _refusal(what: str, code: str, remedy: str) -> ContaminationError:
    return ContaminationError(what, code=code, remedy=remedy)
