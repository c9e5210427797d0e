"""Models with a leak of our own between packed documents, for tests that must see one whatever transformers mends.

    leaky_attention   each token attends to every earlier one of its row, whatever the batch says of documents
    leaky_state       a running mean of the states of the whole row joins each token, as a state-space model's state would

Both are Llamas, exact once isolated: the first by `varlen`, the second by `unpack` alone. `register()` makes them known to
transformers by these names, so that commands can be given them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

LEAKS = ("leaky_attention", "leaky_state")


def row_wide(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention over the whole row. Padding is on the right, where no real token sees it."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


class LeakyAttentionConfig(LlamaConfig):
    model_type = "leaky_attention"


class LeakyStateConfig(LlamaConfig):
    model_type = "leaky_state"


class LeakyAttentionForCausalLM(LlamaForCausalLM):
    config_class = LeakyAttentionConfig

    def __init__(self, config: LeakyAttentionConfig) -> None:
        config._attn_implementation = "row_wide"
        super().__init__(config)


class LeakyStateForCausalLM(LlamaForCausalLM):
    config_class = LeakyStateConfig

    def __init__(self, config: LeakyStateConfig) -> None:
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(_with_running_mean)


def _with_running_mean(module: Any, inputs: Any, states: torch.Tensor) -> torch.Tensor:
    counts = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)
    return states + states.cumsum(1) / counts[:, None]


def register() -> None:
    """Known to `AutoConfig` and `AutoModelForCausalLM` from here on, in this process."""
    AttentionInterface.register("row_wide", row_wide)
    AttentionMaskInterface.register("row_wide", lambda *_, **__: None)
    for config, model in (
        (LeakyAttentionConfig, LeakyAttentionForCausalLM),
        (LeakyStateConfig, LeakyStateForCausalLM),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


register()
