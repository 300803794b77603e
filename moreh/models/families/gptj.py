"""GPT-J: rotary positions, one norm a layer for attention and MLP in parallel, an output layer with a bias."""

from moreh.models.architecture import Architecture
from moreh.models.families.family import Family
from moreh.models.families.gpt2 import GPT_ALIASES
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import decoder, norms, plain_mlp, separate_projections
from moreh.models.families.tp_blocks import GPTJ_MLP, attention_block


def _architecture(config: HFConfig) -> Architecture:
    linears = separate_projections(config, bias=False, order="kvq", output="attn.out_proj")
    linears += plain_mlp(config, "mlp.fc_in", "mlp.fc_out")
    norm = norms(1, config.hidden, "layer")
    return decoder(config, linears, norm, norm, norm="layer", head_bias=True)


FAMILY = Family(
    "gptj",
    tensor_parallel=(attention_block("attn", "q_proj k_proj v_proj", "out_proj"), GPTJ_MLP),
    packable=True,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 50400,
            "hidden_size": 4096,
            "intermediate_size": None,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        aliases=GPT_ALIASES,
        renamed={"intermediate_size": "n_inner"},
    ),
    architecture=_architecture,
)
