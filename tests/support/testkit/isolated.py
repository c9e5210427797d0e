"""Documents packed into one row of an isolated model, beside each alone."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sft_plugins.packing.isolation.apply import isolate
from testkit.isolation_oracle import Gap, gap, make_documents
from testkit.tiny_models import build

LENGTHS = [5, 9, 1, 17, 3, 9]
# Through `isolate`, which turns to documents of equal length where a model pads wrongly (llama4 in transformers 5.16).
WAYS: dict[str, Callable[[Any], Any]] = {"unpack": functools.partial(isolate, backend="unpack"), "auto": isolate}
# dense, sliding window, chunked, experts, hybrid of Mamba and attention, sinks, recurrent, delta rule, wrapper
ARCHITECTURES = [
    "llama",
    "mistral",
    "llama4_text",
    "mixtral",
    "jamba",
    "gpt_oss",
    "mamba",
    "qwen3_next",
    "gemma3",
    "opt",
]


LOGITS, GRADIENTS = 1e-5, 1e-4

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


def documents_of(tiny: Any) -> list[torch.Tensor]:
    return make_documents(LENGTHS, tiny.vocab_size)


def assert_exact(alone: Any, packed: Any) -> None:
    measured: Gap = gap(alone, packed)
    assert measured.logits <= 1e-5, measured
    assert measured.gradients <= 1e-4, measured
    assert alone.gradients.keys() == packed.gradients.keys()


def through_pickle(model: torch.nn.Module) -> torch.nn.Module:
    """A copy as another process has it."""
    try:
        pickle.dumps(build("llama").model)
    except AttributeError:
        pytest.skip("models of this transformers (5.16, with `kernels` installed) cannot be pickled at all")
    return pickle.loads(pickle.dumps(model))


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TINY, **changes))


def zero(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model
