"""Architectures from configurations count what the models of transformers have: known families, files, defaults."""

import dataclasses
import json

import pytest

from moreh.models.describe.from_module import describe_module
from moreh.models.describe.from_source import describe
from moreh.models.families.builders import FAMILIES, architecture_from_config
from moreh.models.families.config_defaults import DEFAULTS
from tests.conftest import ROOT
from tests.helpers.tiny_models import (
    build,
    described_counts,
    layer_list,
    module_counts,
    name_case,
    names_of_keys,
    same,
    tiny_config_of,
)

MODELS = ROOT / "configs" / "models"

CASES = [
    ("gpt2", {}),
    ("gpt2", {"n_inner": None, "tie_word_embeddings": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    ("gptj", {"rotary_dim": 4}),
    ("gptj", {"rotary_dim": 4, "tie_word_embeddings": True, "n_inner": None, "attn_pdrop": 0.1}),
    ("gpt_neox", {}),
    (
        "gpt_neox",
        {"attention_bias": False, "use_parallel_residual": False, "tie_word_embeddings": True, "hidden_dropout": 0.1},
    ),
    ("opt", {}),
    ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False, "tie_word_embeddings": False}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False, "dropout": 0.0}),
    ("opt", {"_remove_final_layer_norm": True, "word_embed_proj_dim": 32}),
    ("bloom", {}),
    ("bloom", {"tie_word_embeddings": False}),
    ("falcon", {}),
    ("falcon", {"multi_query": False, "bias": True, "parallel_attn": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False}),
    (
        "falcon",
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "alibi": True, "ffn_hidden_size": None},
    ),
    ("llama", {}),
    ("llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 20, "num_key_value_heads": 1, "attention_dropout": 0.1}),
    ("mistral", {"num_key_value_heads": 2}),
    ("mistral", {"num_key_value_heads": 4, "sliding_window": None, "head_dim": 8, "tie_word_embeddings": True}),
    ("mixtral", {"num_key_value_heads": 2}),
    ("mixtral", {"num_key_value_heads": 4, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 16}),
    ("qwen2", {"num_key_value_heads": 4}),
    (
        "qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    ("qwen3", {"num_key_value_heads": 2}),
    ("qwen3", {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    ("gemma", {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": False}),
    ("gemma2", {"num_key_value_heads": 2, "head_dim": 8}),
    (
        "gemma2",
        {"num_key_value_heads": 4, "sliding_window": 8, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
    ),
    ("phi", {}),
    ("phi", {"num_key_value_heads": 2, "qk_layernorm": True, "tie_word_embeddings": True}),
    ("phi3", {}),
    ("phi3", {"num_key_value_heads": 2, "sliding_window": 8, "resid_pdrop": 0.1}),
    ("starcoder2", {"num_key_value_heads": 2}),
    ("starcoder2", {"num_key_value_heads": 4, "use_bias": False, "tie_word_embeddings": False}),
]
# What `sum(p.numel() for p in model.parameters())` gives for these models of transformers, as a fixed number each.
KNOWN_COUNTS = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "cerebras_gpt_13b": 12_853_386_240,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "llama2_13b": 13_015_864_320,
    "mistral_7b": 7_241_732_096,
    "qwen1_5_7b": 7_721_324_544,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "mixtral_8x7b": 46_702_792_704,
}


@pytest.mark.parametrize(("family", "changes"), CASES, ids=name_case)
def test_family_counts_its_module(family, changes):
    config = tiny_config_of(family, changes)
    model = build(config)
    architecture = architecture_from_config(config, "tiny")
    assert described_counts(architecture) == module_counts(model)
    layers = layer_list(model)
    assert [layer.parameters for layer in architecture.layers] == [module_counts(layer)[0] for layer in layers]
    assert [layer.trainable_tensors for layer in architecture.layers] == [module_counts(layer)[2] for layer in layers]
    # The module says the same of itself, matrix by matrix, and so does its complete configuration.
    assert same(describe_module(model), architecture)
    assert same(architecture_from_config(model.config.to_dict(), "tiny"), architecture)


def test_cases_cover_every_family():
    assert {family for family, _ in CASES} == set(FAMILIES) == set(DEFAULTS)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(family):
    model = build({"model_type": family}, "meta")
    architecture = architecture_from_config({"model_type": family}, "default")
    assert described_counts(architecture) == module_counts(model)
    assert same(describe_module(model), architecture)
    names = names_of_keys(family)
    fields = {field.name: field.default for field in dataclasses.fields(type(model.config))}
    assert {key: fields.get(names.get(key, key)) for key in DEFAULTS[family]} == dict(DEFAULTS[family])


@pytest.mark.parametrize("name", KNOWN_COUNTS)
def test_model_files(name):
    path = MODELS / f"{name}.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    architecture = describe(path)
    assert architecture.name == name
    assert architecture.parameters == KNOWN_COUNTS[name]
    model = build(config, "meta")
    assert described_counts(architecture) == module_counts(model)
    assert same(describe_module(model), architecture)


def test_every_model_file_is_tested():
    assert {path.stem for path in MODELS.glob("*.json")} == set(KNOWN_COUNTS)


def test_fields_of_known_models():
    llama, mixtral, gpt = (
        describe(MODELS / f"{name}.json") for name in ("llama3_70b", "mixtral_8x7b", "cerebras_gpt_13b")
    )
    assert [len(list(model.layer_kinds())) for model in (llama, mixtral, gpt)] == [1, 1, 1]
    layer = llama.layers[0]
    assert (len(llama.layers), layer.heads, layer.kv_heads, layer.head_dim) == (80, 64, 8, 128)
    assert {linear.name: linear.split for linear in layer.linears} == {
        **{f"self_attn.{part}_proj": "column" for part in "qkv"},
        "self_attn.o_proj": "row",
        "mlp.gate_proj": "column",
        "mlp.up_proj": "column",
        "mlp.down_proj": "row",
    }
    assert layer.sharded_parameters == layer.parameters - 2 * 8192
    assert (llama.rotary, llama.gated, llama.norm, llama.dropout, llama.tied) == (True, True, "rms", False, False)
    router, up, down = mixtral.layers[0].linears[-3:]
    assert (router.name, router.split, router.outputs) == ("mlp.gate", "none", 8)
    assert (up.inputs, up.outputs, up.copies, up.active, up.tensors) == (4096, 2 * 14336, 8, 2, 1)
    assert (down.inputs, down.outputs, down.split) == (14336, 4096, "row")
    assert (gpt.rotary, gpt.gated, gpt.norm, gpt.dropout, gpt.tied) == (False, False, "layer", False, True)
    assert gpt.table_parameters == 2048 * 5120
    assert describe(MODELS / "mistral_7b.json").layers[0].window == 4096
    assert describe(MODELS / "qwen2_5_7b.json").layers[0].window is None
    kinds = list(architecture_from_config({"model_type": "gemma2"}, "").layer_kinds())
    assert [(layer.window, count) for layer, count in kinds] == [(4096, 13), (None, 13)]


def test_published_names_of_keys():
    """Files of Bloom say n_embed and num_attention_heads, those of GPT-2 may say hidden_size."""
    bloom = {"model_type": "bloom", "n_embed": 96, "hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3}
    gpt2 = {"model_type": "gpt2", "hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 3}
    for config in (bloom, gpt2):
        architecture = architecture_from_config(config, "names")
        assert (architecture.hidden, len(architecture.layers), architecture.layers[0].heads) == (96, 3, 6)
        assert described_counts(architecture) == module_counts(build(config, "meta"))
    ignored = {"model_type": "gpt2", "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 8}
    assert architecture_from_config(ignored, "") == architecture_from_config({"model_type": "gpt2"}, "")


def test_known_families_need_no_torch(run_python):
    source = """
import sys
import moreh.models.describe.from_source
architecture = moreh.models.describe.from_source.describe(sys.argv[1])
print(architecture.parameters, [name for name in ("torch", "transformers") if name in sys.modules])
"""
    finished = run_python(source, MODELS / "llama3_70b.json")
    assert finished.stdout == "70553706496 []\n", finished.stderr
