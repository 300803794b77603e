"""Settings of the tests of each family: one entry for each family of the registry.

A test fails for a family without an entry (tests/models/test_families.py).
"""

from dataclasses import dataclass, field
from typing import Any

from tests.helpers.models.expert_settings import GPT_OSS, ONE_CONFIGURATION, QWEN3_EXPERTS, WINDOWS

# Changes of the tiny configuration of tests/helpers/models/tiny_models.py.
Changes = dict[str, Any]

# As many key-value heads as tensor-parallel ranks.
HEADS = {"num_key_value_heads": 4, "num_hidden_layers": 2}
OLD_FALCON = {"multi_query": False, "bias": True}


@dataclass(frozen=True)
class FamilyCases:
    """The configurations that a family is tested with."""

    training: Changes = field(default_factory=dict)
    """Settings of a tiny model for training with two tensor-parallel ranks, and for packing."""
    tensor_parallel: tuple[Changes, ...] = (HEADS,)
    """Configurations to compare with two and with four tensor-parallel ranks, one for each way in which the family
    computes; none if tensor parallelism is refused."""
    architecture: tuple[Changes, ...] = ()
    """The model to compare the configuration's architecture with; None if transformers builds the model."""


FAMILY_CASES = {
    "apertus": FamilyCases(),
    "arcee": FamilyCases(),
    "bitnet": FamilyCases(
        training={"num_key_value_heads": 2},
        # Four ranks have unequal parts of 30 inner features, over which a norm goes.
        tensor_parallel=(HEADS, HEADS | {"intermediate_size": 30}),
        architecture=(
            {"num_key_value_heads": 2},
            {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True, "attention_dropout": 0.1},
        ),
    ),
    "bloom": FamilyCases(
        architecture=(
            {},
            {"tie_word_embeddings": False},
        ),
    ),
    "codegen": FamilyCases(
        training={"num_attention_heads": 8, "rotary_dim": 4},
        tensor_parallel=({"num_attention_heads": 16, "hidden_size": 96, "rotary_dim": 4},),
    ),
    "cohere": FamilyCases(
        tensor_parallel=(
            HEADS,
            HEADS | {"use_qk_norm": True},
        ),
    ),
    "cohere2": FamilyCases(),
    "cwm": FamilyCases(
        training={"num_key_value_heads": 2, "head_dim": 12, **WINDOWS},
    ),
    "ernie4_5": FamilyCases(),
    "exaone4": FamilyCases(
        training={"num_key_value_heads": 2, **WINDOWS},
    ),
    "falcon": FamilyCases(
        training={"new_decoder_architecture": True, "num_kv_heads": 2},
        tensor_parallel=(
            {"new_decoder_architecture": True, "num_kv_heads": 4},
            OLD_FALCON | {"alibi": True, "parallel_attn": False},
            OLD_FALCON | {"alibi": True, "attn_implementation": "eager"},
        ),
        architecture=(
            {},
            {"multi_query": False, "bias": True, "parallel_attn": False},
            {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "alibi": True, "ffn_hidden_size": None},
        ),
    ),
    "gemma": FamilyCases(
        training={"num_key_value_heads": 2, "head_dim": 12},
        architecture=(
            {"num_key_value_heads": 1, "head_dim": 16},
            {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": False},
        ),
    ),
    "gemma2": FamilyCases(
        tensor_parallel=(HEADS | {"query_pre_attn_scalar": 12},),
        architecture=(
            {"num_key_value_heads": 2, "head_dim": 8},
            {
                "num_key_value_heads": 4,
                "sliding_window": 8,
                "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            },
        ),
    ),
    "gemma3_text": FamilyCases(),
    "glm": FamilyCases(),
    "glm4": FamilyCases(),
    "gpt2": FamilyCases(
        tensor_parallel=(
            {},
            {"attn_implementation": "eager", "tie_word_embeddings": False},
        ),
        architecture=(
            {},
            {"n_inner": None, "tie_word_embeddings": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        ),
    ),
    "gpt_bigcode": FamilyCases(tensor_parallel=()),
    "gpt_neo": FamilyCases(
        training={"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 6},
        tensor_parallel=({"attention_types": [[["global", "local"], 1]], "num_hidden_layers": 2},),
    ),
    "gpt_neox": FamilyCases(
        architecture=(
            {},
            {
                "attention_bias": False,
                "use_parallel_residual": False,
                "tie_word_embeddings": True,
                "hidden_dropout": 0.1,
            },
        ),
    ),
    "gpt_oss": FamilyCases(
        training=GPT_OSS | {"num_key_value_heads": 2},
        tensor_parallel=(
            GPT_OSS | {"num_key_value_heads": 4},
            # As many heads as elements in each: their sinks look like a norm of each head.
            GPT_OSS | {"num_key_value_heads": 4, "head_dim": 4, "experts_implementation": "batched_mm"},
        ),
    ),
    "gptj": FamilyCases(
        training={"rotary_dim": 8},
        tensor_parallel=({"rotary_dim": 8},),
        architecture=(
            {"rotary_dim": 4},
            {"rotary_dim": 4, "tie_word_embeddings": True, "n_inner": None, "attn_pdrop": 0.1},
        ),
    ),
    "granite": FamilyCases(),
    "granite_swa": FamilyCases(training=WINDOWS, tensor_parallel=({"num_key_value_heads": 4, **WINDOWS},)),
    "helium": FamilyCases(
        training={"num_key_value_heads": 2, "head_dim": 12},
        tensor_parallel=(HEADS | {"head_dim": 12},),
    ),
    "hunyuan_v1_dense": FamilyCases(
        training={"num_key_value_heads": 2, "head_dim": 12},
        tensor_parallel=(HEADS | {"head_dim": 12},),
    ),
    "hyperclovax": FamilyCases(),
    "internlm3": FamilyCases(),
    "iquestcoder": FamilyCases(
        training={"num_key_value_heads": 2},
    ),
    "jais2": FamilyCases(),
    "llama": FamilyCases(
        tensor_parallel=(
            HEADS,
            HEADS | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        ),
        architecture=(
            {},
            {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
            {"head_dim": 20, "num_key_value_heads": 1, "attention_dropout": 0.1},
        ),
    ),
    "ministral": FamilyCases(
        training={"num_key_value_heads": 2, "head_dim": 12, **WINDOWS},
        tensor_parallel=(HEADS | {"head_dim": 12},),
    ),
    "ministral3": FamilyCases(
        training={"num_key_value_heads": 2, "head_dim": 12},
    ),
    "mistral": FamilyCases(
        training={"num_key_value_heads": 2, "sliding_window": 6},
        architecture=(
            {"num_key_value_heads": 2},
            {"num_key_value_heads": 4, "sliding_window": None, "head_dim": 8, "tie_word_embeddings": True},
        ),
    ),
    "mixtral": FamilyCases(
        training={"num_key_value_heads": 2, "num_local_experts": 4, "experts_implementation": "eager"},
        tensor_parallel=(
            HEADS | {"num_local_experts": 7, "experts_implementation": "eager"},
            HEADS | {"num_local_experts": 4, "experts_implementation": "batched_mm"},
        ),
        architecture=(
            {"num_key_value_heads": 2},
            {"num_key_value_heads": 4, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 16},
        ),
    ),
    "mpt": FamilyCases(),
    "nanochat": FamilyCases(),
    "nemotron": FamilyCases(
        training={"num_key_value_heads": 2},
    ),
    "olmo": FamilyCases(
        tensor_parallel=(HEADS | {"clip_qkv": 0.3},),
    ),
    "olmo2": FamilyCases(),
    "olmo3": FamilyCases(),
    "opt": FamilyCases(
        tensor_parallel=(
            {"word_embed_proj_dim": 32},
            {"do_layer_norm_before": False},
        ),
        architecture=(
            {},
            {"word_embed_proj_dim": 32, "do_layer_norm_before": False, "tie_word_embeddings": False},
            {"enable_bias": False, "layer_norm_elementwise_affine": False, "dropout": 0.0},
            {"_remove_final_layer_norm": True, "word_embed_proj_dim": 32},
        ),
    ),
    "persimmon": FamilyCases(),
    "phi": FamilyCases(
        tensor_parallel=(HEADS | {"qk_layernorm": True},),
        architecture=(
            {},
            {"num_key_value_heads": 2, "qk_layernorm": True, "tie_word_embeddings": True},
        ),
    ),
    "phi3": FamilyCases(
        architecture=(
            {},
            {"num_key_value_heads": 2, "sliding_window": 8, "resid_pdrop": 0.1},
        ),
    ),
    "qwen2": FamilyCases(
        training={"num_key_value_heads": 2},
        architecture=(
            {"num_key_value_heads": 4},
            {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True},
        ),
    ),
    "qwen3": FamilyCases(
        training={"num_key_value_heads": 2, "head_dim": 16},
        tensor_parallel=(HEADS | {"head_dim": 16},),
        architecture=(
            {"num_key_value_heads": 2},
            {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
        ),
    ),
    "qwen3_moe": FamilyCases(
        training=QWEN3_EXPERTS,
        tensor_parallel=(QWEN3_EXPERTS | {"num_experts": 7}, QWEN3_EXPERTS | {"num_experts": 4}),
    ),
    "seed_oss": FamilyCases(
        training={"num_key_value_heads": 2, "head_dim": 12},
    ),
    "smollm3": FamilyCases(),
    "stablelm": FamilyCases(
        training={"num_key_value_heads": 2, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}},
        tensor_parallel=(HEADS | {"partial_rotary_factor": 0.5},),
    ),
    "starcoder2": FamilyCases(
        architecture=(
            {"num_key_value_heads": 2},
            {"num_key_value_heads": 4, "use_bias": False, "tie_word_embeddings": False},
        ),
    ),
    "vaultgemma": FamilyCases(),
    **{name: FamilyCases(changes, (changes,)) for name, changes in ONE_CONFIGURATION.items()},
}

# By family, what a tiny model needs to be trained.
FAMILY_SETTINGS: dict[str, Changes] = {name: cases.training for name, cases in FAMILY_CASES.items()}
