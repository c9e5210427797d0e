"""Every architecture of transformers' causal-LM mapping, built tiny from its configuration: a few thousand weights each.

Invariant: what is built is the architecture itself, only narrow. One layer of every kind that the default configuration has
(full, sliding, chunked, linear, dense, sparse …), windows and chunks of a few tokens so that short documents cross them,
dropout off, and weights large enough that every logit depends on its whole context: a leak shows.

    >>> tiny = build("gpt_oss")
    >>> tiny.model.config.sliding_window, tiny.vocab_size
    (7, 96)

`architectures()` names them all; `CANNOT_BUILD` says which cannot be built, and why.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 96
HIDDEN = 32
WINDOW = 7
"""Length of every sliding window and attention chunk: shorter than most test documents, a divisor of none."""


def _each(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


# Sizes by the name of the configuration's field, wherever it occurs (text, vision, audio …).
SIZES: dict[str, Any] = {
    **_each(
        HIDDEN,
        "hidden_size d_model n_embd embed_dim emb_dim embedding_dim embedding_size input_embedding_size hidden_dim "
        "output_embedding_size word_embed_proj_dim lru_width attention_hidden_size adapter_out_dim "
        "hidden_size_global pronunciation_embed_dim shape_embed_dim backbone_hidden_size projector_input_dim "
        "projector_output_dim out_hidden_size dim_model_base",
    ),
    **_each(
        48,
        "intermediate_size ffn_dim ffn_hidden_size expert_ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dim_ff dff d_ff "
        "d_inner n_inner moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size dense_intermediate_size intermediate_size_mlp feed_forward_size mlp_dim "
        "shared_intermediate_size",
    ),
    **_each(
        4,
        "num_attention_heads n_head n_heads attention_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_heads "
        "linear_num_value_heads mamba_n_heads mamba_num_heads index_n_heads num_heads",
    ),
    **_each(
        2,
        "num_key_value_heads swa_num_key_value_heads num_kv_heads linear_num_key_heads kv_n_heads num_query_groups "
        "num_global_key_value_heads",
    ),
    **_each(
        8,
        "head_dim swa_head_dim kv_channels dim_head attention_head_size attention_head_dim d_head d_kv linear_head_dim "
        "linear_key_head_dim linear_value_head_dim index_head_dim qk_nope_head_dim v_head_dim global_head_dim",
    ),
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    **_each(8, "rotary_dim q_lora_rank kv_lora_rank o_lora_rank hc_lowrank gated_norm_rank adapter_rank"),
    **_each(8, "laurel_rank hidden_size_per_layer_input router_hidden_size"),
    **_each(
        2,
        "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers depth num_layers_per_stack",
    ),
    **_each(4, "num_experts num_local_experts n_routed_experts moe_num_experts num_experts_global"),
    **_each(2, "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts"),
    **_each(1, "n_shared_experts num_shared_experts moe_num_shared_experts zero_expert_num"),
    **_each(1, "n_group topk_group num_expert_group"),
    **_each(
        WINDOW,
        "sliding_window sliding_window_size attention_window_size window_size local_attention attention_chunk_size "
        "local_attention_window_len keep_window_size",
    ),
    **_each(4, "mamba_d_state state_size ssm_state_size"),
    **_each(16, "mamba_d_head mamba_head_dim mamba_headdim"),
    **_each(1, "mamba_n_groups n_groups mamba_ngroups"),
    **_each(8, "mamba_chunk_size chunk_size"),
    **_each(4, "mamba_dt_rank time_step_rank"),
    **_each(
        512,
        "max_position_embeddings n_positions n_ctx max_target_positions max_source_positions max_seq_len context_length "
        "model_max_length original_max_position_embeddings",
    ),
    **_each(HIDDEN, "output_channels nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel"),
    **_each(32, "image_size crop_size"),
    **_each(6, "index_topk index_topk_blocks"),
    **_each(VOCAB, "vocab_size vocab_size_per_layer_input audio_vocab_size decoder_vocab_size"),
    **_each(VOCAB, "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab"),
    "query_pre_attn_scalar": 8,
    "initializer_range": 0.02,
}

SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")

# What no rule gets right, by the name of the architecture. Dotted names reach into sub-configurations.
_DERIVED = object()
"""Marks a field to be left out, so that the configuration derives it from the others."""

_ATTENTION_KINDS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": WINDOW}
_LINEAR_FULL = ["linear_attention", "full_attention"]
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "max_seq_len": 512},
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "num_hidden_layers": 3,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 5},
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "per_layer_config": _DERIVED,
        "rope_parameters": _DERIVED,
    },
    "dots3_note": {"vision_config.adapter_in_dim": HIDDEN, "audio_config.adapter_input_size": HIDDEN},
    "falcon_h1": {"mamba_d_ssm": 32},
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
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _ATTENTION_KINDS,
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None, "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "mellum": _ATTENTION_KINDS,
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse"]},
    "ministral": {"head_dim": 8, **_ATTENTION_KINDS},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "eos_token_id": 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "heads_per_ngram": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 1,
        "num_buckets": 4,  # derived from the first sequence it ever sees, if left out
    },
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": _DERIVED,
        "attention_head_dim": _DERIVED,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zamba2": {"n_mamba_heads": 4}
    | dict.fromkeys(("attention_hidden_size", "attention_head_dim", "kv_channels"), _DERIVED),
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": WINDOW},
}
for _wrapper in ("gemma4", "gemma4_unified", "qwen4_exp", "dots3_note"):
    _text = {f"text_config.{key}": value for key, value in OVERRIDES[_wrapper + "_text"].items()}
    OVERRIDES[_wrapper] = {**OVERRIDES.get(_wrapper, {}), **_text}

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
    """Names of the causal-LM mapping of the installed transformers that can be built here."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in CANNOT_BUILD]


def build(name: str, *, seed: int = 0, **changes: Any) -> Tiny:
    """The architecture `name`, tiny, its weights a function of `seed`; `changes` override its configuration."""
    config = tiny_config(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        enlarge_weights(model)
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    return Tiny(name, model, min(head.weight.shape[0] for head in heads if head is not None))


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The default configuration of `name`, narrowed by the rules above and by `OVERRIDES[name]`."""
    kind = CONFIG_MAPPING[name]
    return kind(**_narrowed(kind(), {**OVERRIDES.get(name, {}), **changes}))


def _narrowed(config: PreTrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """The fields of `config` that must change, with their new values."""
    fields = config.to_dict()
    new: dict[str, Any] = {}
    for key, value in fields.items():
        inner = vars(config).get(key)
        if isinstance(inner, PreTrainedConfig):
            prefix = key + "."
            new[key] = _narrowed(inner, {k[len(prefix) :]: v for k, v in overrides.items() if k.startswith(prefix)})
        elif key in SIZES and isinstance(value, int | float) and not isinstance(value, bool):
            new[key] = min(SIZES[key], value)
        elif "drop" in key and isinstance(value, float):
            new[key] = 0.0
        elif key in SPECIAL_TOKENS and value is not None:
            new[key] = SPECIAL_TOKENS[key]
        elif key == "is_decoder":
            new[key] = True
    if "kv_lora_rank" in fields:  # multi-head latent attention: as many key heads as heads, and two kinds of head size
        new["num_key_value_heads"] = SIZES["num_attention_heads"]
        if fields.get("head_dim") == fields.get("qk_rope_head_dim"):
            new["head_dim"] = SIZES["qk_rope_head_dim"]
        elif "head_dim" in fields:
            new["head_dim"] = SIZES["qk_head_dim"]
    new |= _one_layer_of_each_kind(fields)
    new |= {key: value for key, value in overrides.items() if "." not in key}
    return {key: value for key, value in new.items() if value is not _DERIVED}


def _one_layer_of_each_kind(fields: dict[str, Any]) -> dict[str, Any]:
    """Lists with one entry per layer, cut to the first layer of each kind, and the number of layers that leaves."""
    count_key = next((key for key in LAYER_COUNTS if isinstance(fields.get(key), int)), None)
    if count_key is None:
        return {}
    lists = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == fields[count_key] and len(v) > 2}
    lists = {k: v for k, v in lists.items() if v != list(range(len(v)))}
    kinds = [tuple(map(repr, layer)) for layer in zip(*lists.values(), strict=True)]
    keep = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    if not keep:
        return {}
    keep = keep if len(keep) > 1 else keep * 2
    narrow = {k: [min(SIZES[k], v[i]) if k in SIZES else v[i] for i in keep] for k, v in lists.items()}
    return {**narrow, count_key: len(keep)}


def enlarge_weights(model: PreTrainedModel) -> None:
    """Scale every matrix to unit gain and give every vector some noise, so that each logit depends on its whole context.

    A model's own initialisation (std .02 as a rule) leaves attention flat and residual branches silent: a leak would
    change the last digits only. Structured parameters (decays, time constants) keep their form.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.1 * torch.randn_like(parameter)
            elif (parameter.std() == 0 and parameter.mean() == 0) or parameter.mean().abs() < parameter.std():
                fan_in = parameter[0].numel() if parameter.dim() < 3 else parameter.shape[-1]
                parameter.copy_(torch.randn_like(parameter) * 1.2 / fan_in**0.5)
