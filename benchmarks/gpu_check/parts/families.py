"""Small models with random weights, one of each of twelve families of transformers."""

from typing import Any

import torch

from gpu_check.settings import Settings

VOCABULARY = 2048
# What the configuration of a family needs beside the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32},
    "gpt_neox": {},
    "phi": {},
    "phi3": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 2},
}


def make_model(family: str, settings: Settings, **changes: Any) -> Any:
    """A model of a family on the device, always with the same weights, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    sizes = {
        "hidden_size": settings.hidden,
        "num_hidden_layers": 2 if settings.dry else 4,
        "num_attention_heads": 4,
        "intermediate_size": 2 * settings.hidden,
        "max_position_embeddings": settings.length,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if family == "gpt2":
        sizes = {names.get(name, name): value for name, value in sizes.items()}
        sizes["n_positions"] = sizes.pop("max_position_embeddings")
        del sizes["intermediate_size"]
    config = AutoConfig.for_model(family, **sizes | FAMILIES[family] | changes)
    # Dropout draws other numbers where the work is cut in another way.
    for name in list(vars(config)):
        if ("drop" in name or name.endswith("_pdrop")) and isinstance(getattr(config, name), float):
            setattr(config, name, changes.get(name, 0.0))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(settings.device)
