"""Mixtral: Mistral with a mixture of experts instead of the MLP."""

from dataclasses import replace

from moreh.models.architecture import Architecture, Linear
from moreh.models.families.family import Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import llama_like, separate_projections
from moreh.models.families.tp_blocks import GATED_EXPERTS, SEPARATE_QKV


def _architecture(config: HFConfig) -> Architecture:
    experts, active = config.size("num_local_experts"), config.size("num_experts_per_tok")
    if active > experts:
        raise config.refuse("num_experts_per_tok", f"at most the {experts} experts of num_local_experts")
    router = Linear("mlp.gate", config.hidden, experts, "none", bare=True)
    gate_up = Linear(
        "mlp.experts.gate_up_proj",
        config.hidden,
        2 * config.inner,
        "column",
        copies=experts,
        active=active,
        stacked=True,
    )
    down = replace(gate_up, name="mlp.experts.down_proj", inputs=config.inner, outputs=config.hidden, split="row")
    linears = (*separate_projections(config, bias=False), router, gate_up, down)
    return llama_like(config, linears, windows=config.windows((True,) * config.layers))


FAMILY = Family(
    "mixtral",
    tensor_parallel=(SEPARATE_QKV,),
    experts=GATED_EXPERTS,
    packable=True,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": None,
            "sliding_window": None,
            "attention_dropout": 0.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    architecture=_architecture,
)
