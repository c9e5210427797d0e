"""The `native` backend: kernels of the model's own that read document boundaries.

Invariant: the model's code runs as its authors wrote it, with `cu_seq_lens_q/k`, `max_length_q/k` and `seq_idx` handed
on, `use_cache` off and no attention mask. Whether that isolates documents is for the probe to say.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any

from torch import nn

from sft_plugins.packing.isolation.boundaries import Boundaries
from sft_plugins.packing.isolation.frame import Call, Switch

_LINEAR_KERNELS = ("fla", "mamba_ssm", "causal_conv1d")


class Native:
    """The model's own kernels tell documents apart."""

    name = "native"
    keep_keys = True
    trees = False

    def open(self, module: nn.Module, boundaries: Boundaries) -> Switch:  # noqa: ARG002
        """Nothing to switch."""
        return nullcontext

    def run(self, call: Call, arguments: dict[str, Any], boundaries: Boundaries) -> Any:  # noqa: ARG002
        """The packed row goes through the backbone as it is."""
        return call(**arguments)


def uses_flash_attention(model: nn.Module) -> bool:
    """Whether the model's attention implementation is one that reads cu_seqlens, as its name says."""
    return "flash" in str(getattr(model.config, "_attn_implementation", ""))


def has_linear_kernels() -> bool:
    """Whether a package of linear-attention or state-space kernels is installed."""
    return any(importlib.util.find_spec(package) is not None for package in _LINEAR_KERNELS)
