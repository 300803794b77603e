"""Changes of the tiny configuration for families with a mixture of experts, or with latent attention."""

# Two of three layers see the last six tokens only.
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}


def experts(key, count=7, **changes):
    """A mixture of `count` experts, counted by a configuration under `key`, of which each token has two."""
    return {"num_key_value_heads": 4, "experts_implementation": "eager", "num_experts_per_tok": 2, key: count} | changes


GPT_OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 12,
    **WINDOWS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "experts_implementation": "eager",
}
# Multi-head latent attention.
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
# The first layer is dense.
LATENT_EXPERTS = {
    **LATENT,
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
# By family, the one configuration with which it is tested.
ONE_CONFIGURATION = {
    "afmoe": experts("num_experts", moe_intermediate_size=24, head_dim=12, num_dense_layers=1, **WINDOWS),
    "aria_text": experts("moe_num_experts", moe_topk=2, moe_num_shared_experts=1),
    "cohere2_moe": experts("num_experts", head_dim=12, num_shared_experts=0, **WINDOWS),
    "deepseek_v2": LATENT_EXPERTS,
    "deepseek_v3": LATENT_EXPERTS,
    "dots1": experts(
        "n_routed_experts",
        8,
        moe_intermediate_size=24,
        n_shared_experts=1,
        n_group=2,
        first_k_dense_replace=1,
        **WINDOWS,
    ),
    "ernie4_5_moe": experts("moe_num_experts", moe_k=2, moe_intermediate_size=24, moe_layer_start_index=1),
    "exaone_moe": experts("num_experts", 8, moe_intermediate_size=24, n_group=2, first_k_dense_replace=1, **WINDOWS),
    "flex_olmo": experts("num_experts"),
    "glm4_moe": experts(
        "n_routed_experts", 8, moe_intermediate_size=24, n_group=2, first_k_dense_replace=1, use_qk_norm=True
    ),
    "glm4_moe_lite": LATENT_EXPERTS,
    "granitemoe": experts("num_local_experts"),
    "granitemoe_swa": experts("num_local_experts", **WINDOWS),
    "granitemoeshared": experts("num_local_experts", shared_intermediate_size=40),
    "hunyuan_v1_moe": experts("num_experts", moe_topk=2, head_dim=12),
    "hy_v3": experts("num_experts", moe_intermediate_size=24, head_dim=12, first_k_dense_replace=1),
    "kolibri1": experts("num_experts", moe_intermediate_size=24, head_dim=12, **WINDOWS),
    "laguna": experts("num_experts", moe_intermediate_size=24, head_dim=12, **WINDOWS),
    "mellum": experts("num_experts", moe_intermediate_size=24, head_dim=12, **WINDOWS),
    "minicpm3": LATENT,
    "minimax_m2": experts("num_local_experts", head_dim=12, rotary_dim=12),
    "olmoe": experts("num_experts"),
    "phimoe": experts("num_local_experts", router_jitter_noise=0.0, input_jitter_noise=0.0),
    "qwen2_moe": experts(
        "num_experts", moe_intermediate_size=24, shared_expert_intermediate_size=40, mlp_only_layers=[1]
    ),
    "solar_open": experts("n_routed_experts", 8, moe_intermediate_size=24, head_dim=12, n_group=2),
    "youtu": LATENT,
}
