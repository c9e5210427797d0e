"""How wide a twin is: sizes by the name of the configuration's field, and what must fit together in single architectures.

Invariant: nothing here says what an architecture is, only how narrow it is built; kinds of layers are left as they are.
"""

from __future__ import annotations

from typing import Any

VOCAB = 96
HIDDEN = 32
WINDOW = 7
"""Length of every sliding window and attention chunk: shorter than most documents of a probe, a divisor of none."""


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
STACK_SIZES = (*LAYER_COUNTS, "encoder_layers", "num_encoder_layers", "num_decoder_layers")

DERIVED = object()
"""Marks a field to be left out, so that the configuration derives it from the others."""

# What no rule gets right, by the name of the architecture. Dotted names reach into sub-configurations.
FITTING: dict[str, dict[str, Any]] = {
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 5},
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "max_seq_len": 512},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "per_layer_config": DERIVED,
        "rope_parameters": DERIVED,
    },
    "dory": {"n_input_layers": 0, "n_output_layers": 0, "n_recurrent_layers": DERIVED},
    "dots3_note": {"vision_config.adapter_in_dim": HIDDEN, "audio_config.adapter_input_size": HIDDEN},
    "falcon_h1": {"mamba_d_ssm": 32},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "eos_token_id": 2,
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
    "reformer": {
        "axial_pos_embds": False,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 1,
        "num_buckets": 4,  # derived from the first sequence it ever sees, if left out
    },
    "zamba": {"attention_hidden_size": DERIVED, "attention_head_dim": DERIVED},
    "zamba2": {"n_mamba_heads": 4}
    | dict.fromkeys(("attention_hidden_size", "attention_head_dim", "kv_channels"), DERIVED),
}
for _wrapper in ("dots3_note", "qwen4_exp"):
    _text = {f"text_config.{key}": value for key, value in FITTING[_wrapper + "_text"].items()}
    FITTING[_wrapper] = {**FITTING.get(_wrapper, {}), **_text}
