"""GPT-2: learned positions; its matrices are Conv1D, whose weights are [inputs, outputs]."""

from moreh.models.architecture import Architecture, Linear
from moreh.models.families.family import Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import decoder, norms, plain_mlp
from moreh.models.families.tp_blocks import attention_block, mlp_block, split_qkv

# Other names of keys in files of GPT-2 and GPT-J.
GPT_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}


def _architecture(config: HFConfig) -> Architecture:
    if config.flag("add_cross_attention"):
        raise config.refuse("add_cross_attention", "false: a model with an encoder cannot be planned")
    hidden = config.hidden
    linears = (
        Linear("attn.c_attn", hidden, 3 * hidden, "column", bias=True),
        Linear("attn.c_proj", hidden, hidden, "row", bias=True),
        *plain_mlp(config, "mlp.c_fc", "mlp.c_proj"),
    )
    layer_norms, final_norm = norms(2, hidden, "layer"), norms(1, hidden, "layer")
    positions = config.size("max_position_embeddings") * hidden, 1
    return decoder(config, linears, layer_norms, final_norm, norm="layer", rotary=False, table=positions)


FAMILY = Family(
    "gpt2",
    tensor_parallel=(
        attention_block("attn", "c_attn", "c_proj", split_qkv, head_attributes=("split_size",)),
        mlp_block("mlp", "c_fc", "c_proj"),
    ),
    packable=True,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 50257,
            "hidden_size": 768,
            "intermediate_size": None,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "add_cross_attention": False,
        },
        aliases=GPT_ALIASES,
        renamed={"intermediate_size": "n_inner"},
    ),
    architecture=_architecture,
)
