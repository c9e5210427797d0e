"""Every architecture of transformers' causal-LM mapping, built tiny from its configuration: a few thousand weights each.

Invariant: what is built is the architecture itself, made narrow by `sft_plugins.preflight.narrow`, with one layer of every
kind that it can have (full, sliding, chunked, linear, dense, sparse …) where its default configuration has fewer.

    >>> tiny = build("gpt_oss")
    >>> tiny.model.config.sliding_window, tiny.vocab_size
    (7, 96)

`architectures()` names those that were examined, `not_examined()` those that a newer transformers brought since, and
`CANNOT_BUILD` says which cannot be built, and why.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sft_plugins.preflight.tiny_model.narrow import enlarge_weights, narrow
from sft_plugins.preflight.tiny_model.sizes import SIZES, VOCAB, WINDOW

__all__ = ["CANNOT_BUILD", "PAGE", "VOCAB", "WINDOW", "Tiny", "architectures", "build", "not_examined", "tiny_config"]

PAGE = Path(__file__).parents[3] / "docs" / "isolation-matrix.md"

_ATTENTION_KINDS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": WINDOW}
_LINEAR_FULL = ["linear_attention", "full_attention"]

# What makes the default configuration of an architecture a causal language model with every kind of layer it knows.
CHOICES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "num_hidden_layers": 3,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
    },
    "dory": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "granitemoehybrid": {"layer_types": _LINEAR_FULL},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _ATTENTION_KINDS,
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None, "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mellum": _ATTENTION_KINDS,
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse"]},
    "ministral": _ATTENTION_KINDS,
    "qwen4_exp_text": {"ple_layer_ids": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ["local", "lsh"]},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": WINDOW},
}
for _wrapper in ("gemma4", "gemma4_unified", "qwen4_exp"):
    CHOICES[_wrapper] = {f"text_config.{key}": value for key, value in CHOICES[_wrapper + "_text"].items()}

CANNOT_BUILD: dict[str, str] = {
    "gemma3n": "its vision tower comes from the timm package (its text part is built as gemma3n_text)",
    "gemma4_assistant": "drafts from the key and value states of a target model; no language model on its own",
    "gemma4_unified_assistant": "drafts from the key and value states of a target model; no language model on its own",
    "musicgen": "the mapping pairs the decoder of audio codebooks with a configuration it cannot be built from",
    "musicgen_melody": "the mapping pairs the decoder of audio codebooks with a configuration it cannot be built from",
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny model, ready for inference in fp32 on the CPU, and the number of token ids it takes."""

    name: str
    model: PreTrainedModel
    vocab_size: int


def architectures() -> list[str]:
    """Names of the causal-LM mapping of the installed transformers that have their row on the page, exact or refused."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in _rows_of_the_page()]


def not_examined() -> list[str]:
    """Names of that mapping that nobody has looked at: `python tests/packing/isolation/matrix_table.py` does."""
    return [n for n in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if n not in _rows_of_the_page() and n not in CANNOT_BUILD]


@functools.cache
def _rows_of_the_page() -> frozenset[str]:
    rows = (line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| "))
    return frozenset(cells[1].strip() for cells in rows) - {"architecture", "---"}


def build(name: str, *, seed: int = 0, **changes: Any) -> Tiny:
    """The architecture `name`, tiny, its weights a function of `seed`; `changes` override its configuration."""
    config = tiny_config(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        enlarge_weights(model)
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    return Tiny(name, model, min(head.weight.shape[0] for head in heads if head is not None))


def build_smooth(name: str) -> Tiny:
    """The same for half precision: every token goes to every expert, so that no rounding sends one to another expert."""
    routed = hasattr(tiny_config(name), "num_experts_per_tok")
    return build(name, **({"num_experts_per_tok": SIZES["num_experts"]} if routed else {}))


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The default configuration of `name`, narrow, a decoder, with every kind of layer; `changes` on top."""
    default = CONFIG_MAPPING[name]()
    decoder = {"is_decoder": True} if hasattr(default, "is_decoder") else {}
    return narrow(default, changes={**decoder, **CHOICES.get(name, {}), **changes})
