"""OPT: learned positions from 2 on, feed-forward matrices directly in the layer, embeddings of another width (350M)."""

from moreh.models.architecture import Architecture
from moreh.models.families.family import Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import decoder, norms, plain_mlp, separate_projections
from moreh.models.families.tp_blocks import TPBlock, attention_block, split_none


def _architecture(config: HFConfig) -> Architecture:
    bias, hidden = config.flag("enable_bias"), config.hidden
    linears = separate_projections(config, bias, order="kvq", output="self_attn.out_proj")
    linears += plain_mlp(config, "fc1", "fc2", bias)
    norm = norms(1, hidden, "layer") if config.flag("layer_norm_elementwise_affine") else (0, 0)
    has_final_norm = config.flag("do_layer_norm_before") and not config.flag("_remove_final_layer_norm")
    final = norm if has_final_norm else (0, 0)
    # Positions count from 2.
    table = (config.size("max_position_embeddings") + 2) * hidden, 1
    width = config.optional_size("word_embed_proj_dim") or hidden
    if width != hidden:
        # A matrix into the hidden size before the layers, and one back after them.
        table, final = (table[0] + width * hidden, 2), (final[0] + width * hidden, final[1] + 1)
    layer_norms = 2 * norm[0], 2 * norm[1]
    embedding_dim = 0 if width == hidden else width
    return decoder(
        config, linears, layer_norms, final, norm="layer", rotary=False, table=table, embedding_dim=embedding_dim
    )


FAMILY = Family(
    "opt",
    tensor_parallel=(
        attention_block("self_attn", "q_proj k_proj v_proj", "out_proj"),
        TPBlock(entry="fc1", columns={"fc1": split_none}, row="fc2"),
    ),
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 50272,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "word_embed_proj_dim": None,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "dropout": 0.1,
            "attention_dropout": 0.0,
        },
        renamed={"intermediate_size": "ffn_dim"},
    ),
    architecture=_architecture,
)
