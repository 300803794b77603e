"""Tiny models of the families that tests run on several workers, and the plans that they run under."""

from tests.helpers.tensor_cases import whole_model

# What a tiny model of a family needs besides the sizes that all have.
FAMILY_SETTINGS = {
    "codegen": {"num_attention_heads": 8, "rotary_dim": 4},
    "cwm": {"num_key_value_heads": 2, "head_dim": 12},
    "exaone4": {"num_key_value_heads": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {"num_key_value_heads": 2, "head_dim": 12},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 6},
    "gptj": {"rotary_dim": 8},
    "helium": {"num_key_value_heads": 2, "head_dim": 12},
    "hunyuan_v1_dense": {"num_key_value_heads": 2, "head_dim": 12},
    "iquestcoder": {"num_key_value_heads": 2},
    "ministral": {"num_key_value_heads": 2, "head_dim": 12},
    "ministral3": {"num_key_value_heads": 2, "head_dim": 12},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "experts_implementation": "eager"},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "seed_oss": {"num_key_value_heads": 2, "head_dim": 12},
    "stablelm": {"num_key_value_heads": 2, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}},
}
# One of each kind of attention, of positions, of norms, of fused matrices, of output layers.
FAMILIES = (
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt_neox",
    "opt",
    "phi",
    "phi3",
    "falcon",
    "bloom",
    "gptj",
    "olmo2",
    "nanochat",
    "cohere",
    "starcoder2",
    "olmo",
)
# Families without rules of tensor parallelism.
NOT_TENSOR_PARALLEL = ("mixtral", "gpt_bigcode")

# Plans of four ranks for the three layers of a tiny model and eight sequences.
PP_TP = {"stage_layers": (1, 2), "pipeline": 2, "tensor": 2, "micro_batches": 2, "micro_batch_size": 4}
PLANS = {
    "pp-tp": PP_TP,
    "pp-tp-sequence": {**PP_TP, "sequence_parallel": True, "recomputation": "full"},
    "tp-sharded": {"stage_layers": (3,), "tensor": 2, "data": 2, "micro_batch_size": 4, "sharding": "parameters"},
    "pp-sharded": {
        "stage_layers": (2, 1),
        "pipeline": 2,
        "data": 2,
        "micro_batches": 2,
        "micro_batch_size": 2,
        "sharding": "parameters",
    },
}


def make_model(family, **settings):
    """A tiny model of a family in float64, the same on each rank."""
    return whole_model(family, FAMILY_SETTINGS.get(family, {}) | settings)
