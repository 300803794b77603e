"""What transformers' configuration classes fill in where a config.json leaves a key out, as far as planning needs it.

tests/models/test_architecture.py compares each value with the classes. None stands for what follows from the other values.
"""

from collections.abc import Mapping

Default = int | float | bool | None

_GPT_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}

# Second names of the keys below. Where a file has both names, the one on the left counts.
ALIASES: Mapping[str, Mapping[str, str]] = {
    "gpt2": _GPT_NAMES,
    "gptj": _GPT_NAMES,
    "bloom": {"n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
    "falcon": {"n_embed": "hidden_size"},
}

# The only names of the keys below in files of a family, None where it has no such key and ignores it.
RENAMED: Mapping[str, Mapping[str, str | None]] = {
    "gpt2": {"intermediate_size": "n_inner"},
    "gptj": {"intermediate_size": "n_inner"},
    "bloom": {"intermediate_size": None},
    "falcon": {"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
    "opt": {"intermediate_size": "ffn_dim"},
}

_COLUMNS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)
_SIZES: Mapping[str, tuple[Default, ...]] = {
    "bloom": (250880, 64, None, 2, 8, None, True),
    "falcon": (65024, 4544, None, 32, 71, 2048, True),
    "gemma": (256000, 3072, 24576, 28, 16, 8192, True),
    "gemma2": (256000, 2304, 9216, 26, 8, 8192, True),
    "gpt2": (50257, 768, None, 12, 12, 1024, True),
    "gpt_neox": (50432, 6144, 24576, 44, 64, 2048, False),
    "gptj": (50400, 4096, None, 28, 16, 2048, False),
    "llama": (32000, 4096, 11008, 32, 32, 2048, False),
    "mistral": (32000, 4096, 14336, 32, 32, 131072, False),
    "mixtral": (32000, 4096, 14336, 32, 32, 131072, False),
    "opt": (50272, 768, 3072, 12, 12, 2048, True),
    "phi": (51200, 2048, 8192, 24, 32, 2048, False),
    "phi3": (32064, 3072, 8192, 32, 32, 4096, False),
    "qwen2": (151936, 4096, 22016, 32, 32, 32768, False),
    "qwen3": (151936, 4096, 22016, 32, 32, 32768, False),
    "starcoder2": (49152, 3072, 12288, 30, 24, 4096, True),
}

# A family without "head_dim" or "num_key_value_heads" ignores such a key in its files, as transformers does.
_OTHERS: Mapping[str, Mapping[str, Default]] = {
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "falcon": {
        "num_key_value_heads": None,
        "num_ln_in_parallel_attn": None,
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "gemma": {"num_key_value_heads": 16, "head_dim": 256, "attention_bias": False, "attention_dropout": 0.0},
    "gemma2": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "attention_bias": False,
        "sliding_window": 4096,
        "layer_types": None,
        "attention_dropout": 0.0,
    },
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "add_cross_attention": False},
    "gpt_neox": {"attention_bias": True, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    "gptj": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    },
    "mistral": {"num_key_value_heads": 8, "head_dim": None, "sliding_window": 4096, "attention_dropout": 0.0},
    "mixtral": {
        "num_key_value_heads": 8,
        "head_dim": None,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "opt": {
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "dropout": 0.1,
        "attention_dropout": 0.0,
    },
    "phi": {
        "num_key_value_heads": None,
        "head_dim": None,
        "qk_layernorm": False,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attention_dropout": 0.0,
    },
    "phi3": {
        "num_key_value_heads": None,
        "head_dim": None,
        "sliding_window": None,
        "resid_pdrop": 0.0,
        "attention_dropout": 0.0,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "head_dim": None,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "attention_dropout": 0.0,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "attention_dropout": 0.0,
    },
    "starcoder2": {
        "num_key_value_heads": 2,
        "head_dim": None,
        "use_bias": True,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    },
}

DEFAULTS: Mapping[str, Mapping[str, Default]] = {
    family: dict(zip(_COLUMNS, sizes, strict=True)) | dict(_OTHERS[family]) for family, sizes in _SIZES.items()
}

# The keys that are probabilities of dropout.
DROPOUT_KEYS = (
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "attention_dropout",
    "hidden_dropout",
    "dropout",
    "residual_dropout",
    "embedding_dropout",
)
