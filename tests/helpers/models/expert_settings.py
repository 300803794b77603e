"""Changes of the tiny configuration for families with a mixture of experts."""

GPT_OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "experts_implementation": "eager",
}
# Multi-head latent attention; the first layer is dense.
LATENT_EXPERTS = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "experts_implementation": "eager",
}
QWEN3_EXPERTS = {
    "num_key_value_heads": 4,
    "head_dim": 12,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [1],
    "experts_implementation": "eager",
}
