"""Two tiny mixtures of experts whose routers have an auxiliary loss: what is left to say is the vocabulary."""

_SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # routers that prefer some experts from the first step on
    "router_aux_loss_coef": 0.5,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MIXTRAL = {**_SIZES, "model_type": "mixtral", "num_hidden_layers": 2, "intermediate_size": 48, "num_local_experts": 4}
QWEN2_MOE = {
    **_SIZES,
    "model_type": "qwen2_moe",
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "intermediate_size": 80,
    "num_experts": 8,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
"""The second of its three layers has no experts; the others have a shared one."""
MIXTURES = {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE}
