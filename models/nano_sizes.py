"""How small each size of a transformers configuration is made for a nano model, and what a family wants besides.

A size is set wherever a configuration has a field of that name, in nested ones too.
"""

from typing import Any

WIDTH = 32
VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")
"""Fields that say how many tokens there are."""
SIZES: dict[str, int] = {
    **dict.fromkeys(
        (
            *("hidden_size", "n_embd", "d_model", "embed_dim", "emb_dim", "embedding_size", "lru_width"),
            *("word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "backbone_hidden_size"),
            *("mm_embed_dim", "output_proj_dims", "adapter_in_dim", "adapter_out_dim", "hidden_size_global"),
            *("adapter_input_size", "adapter_output_size"),
        ),
        WIDTH,
    ),
    **dict.fromkeys(
        (
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
            *("num_decoder_layers", "num_blocks", "depth"),
        ),
        2,
    ),
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
            *("encoder_attention_heads", "num_decoder_attention_heads", "mamba_n_heads", "n_mamba_heads"),
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "mamba_dt_rank", "linear_conv_kernel_dim", "router_hidden_size"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "d_kv", "kv_channels", "rotary_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_head_dim", "dim_head", "patch_size", "laurel_rank", "adapter_rank"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "index_head_dim", "mm_posemb_size"), 8),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "d_inner", "dff", "dim_ff", "feed_forward_size", "mlp_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size",), 24),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "mamba_d_state", "state_size", "image_size", "position_embedding_size"), 16
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 64),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "index_n_heads"), 1),
}
"""By field; whoever wants a nano model chooses its vocabulary."""
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")
_ALL_HEADS = {"num_key_value_heads": 4}
_BOTH = {"layer_types": ["linear_attention", "full_attention"]}
_ZAMBA = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], **_ALL_HEADS}
MORE: dict[str, dict[str, Any]] = {
    "axk1": _ALL_HEADS,
    "axk2": _ALL_HEADS,
    "bailing_hybrid": {**_ALL_HEADS, **_BOTH},
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": "auto"},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4},
    },
    "deepseek_v2": _ALL_HEADS,
    "deepseek_v3": {**_ALL_HEADS, "first_k_dense_replace": 1},
    "deepseek_v32": _ALL_HEADS,
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _ALL_HEADS, "vision_config": {"pyramid_num_routed": [-1, 4]}},
    "dots3_note_text": _ALL_HEADS,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "glm4_moe_lite": _ALL_HEADS,
    "glm_moe_dsa": _ALL_HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_BOTH, "mamba_d_head": "auto"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**_ALL_HEADS, **_BOTH},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "longcat_flash": _ALL_HEADS,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "minicpm3": {**_ALL_HEADS, "dim_model_base": WIDTH},
    "qwen3_5": {"text_config": _BOTH},
    "qwen3_5_moe": {"text_config": _BOTH},
    "qwen3_5_moe_text": _BOTH,
    "qwen3_5_text": _BOTH,
    "qwen3_next": _BOTH,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [6, 8]},
    "roc_bert": {
        "pronunciation_vocab_size": 16,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": _ALL_HEADS,
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "mamba_ngroups": 1},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""By `model_type`: what makes a model of these sizes where the sizes alone make none."""
