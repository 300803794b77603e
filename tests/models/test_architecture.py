"""Architectures from configurations count what the models of transformers have: families, files, defaults."""

import dataclasses
import json

import pytest

from moreh.models.describe.from_config import architecture_from_config
from moreh.models.describe.from_module import describe_module
from moreh.models.describe.from_source import describe
from moreh.models.families import FAMILIES, planned_families
from tests.conftest import ROOT
from tests.helpers.models.family_settings import FAMILY_CASES
from tests.helpers.models.tiny_models import (
    build,
    described_counts,
    differing_fields,
    first_module_list,
    module_counts,
    name_case,
    names_of_keys,
    tiny_config_of,
)

MODELS = ROOT / "configs" / "models"

CASES = [(family, changes) for family in planned_families() for changes in FAMILY_CASES[family].architecture]
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
    "cerebras_gpt_111m": 111_050_496,
    "cerebras_gpt_256m": 255_977_024,
    "cerebras_gpt_590m": 590_310_912,
    "cerebras_gpt_1_3b": 1_315_723_264,
    "cerebras_gpt_2_7b": 2_651_553_280,
    "cerebras_gpt_6_7b": 6_658_404_352,
    "deepseek_v3": 671_026_404_352,
    "gemma3_1b": 999_885_952,
    "gpt_oss_20b": 20_914_757_184,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "mistral_7b_v0_3": 7_248_023_552,
    "qwen3_0_6b": 596_049_920,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_next_80b_a3b": 79_674_391_296,
}


@pytest.mark.parametrize(("family", "changes"), CASES, ids=name_case)
def test_architecture_of_a_family_counts_its_module(family, changes):
    config = tiny_config_of(family, changes)
    model = build(config)
    architecture = architecture_from_config(config, "tiny")
    assert described_counts(architecture) == module_counts(model)
    layers = first_module_list(model)
    assert [layer.parameters for layer in architecture.layers] == [module_counts(layer)[0] for layer in layers]
    assert [layer.trainable_tensors for layer in architecture.layers] == [module_counts(layer)[2] for layer in layers]
    # The module says the same of itself, matrix by matrix, and so does its complete configuration.
    assert differing_fields(describe_module(model), architecture) == {}
    assert differing_fields(architecture_from_config(model.config.to_dict(), "tiny"), architecture) == {}


@pytest.mark.parametrize("family", planned_families())
def test_defaults_are_those_of_transformers(family):
    model = build({"model_type": family}, "meta")
    architecture = architecture_from_config({"model_type": family}, "default")
    assert described_counts(architecture) == module_counts(model)
    assert differing_fields(describe_module(model), architecture) == {}
    names = names_of_keys(family)
    fields = {field.name: field.default for field in dataclasses.fields(type(model.config))}
    defaults = FAMILIES[family].config_keys.defaults
    assert {key: fields.get(names.get(key, key)) for key in defaults} == dict(defaults)


@pytest.mark.parametrize("name", KNOWN_COUNTS)
def test_model_files_count_what_transformers_builds(name):
    path = MODELS / f"{name}.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    architecture = describe(path)
    assert architecture.name == name
    assert architecture.parameters == KNOWN_COUNTS[name]
    model = build(config, "meta")
    assert described_counts(architecture) == module_counts(model)
    assert differing_fields(describe_module(model), architecture) == {}


def test_every_model_file_is_tested():
    assert {path.stem for path in MODELS.glob("*.json")} == set(KNOWN_COUNTS)


def test_known_models_have_the_published_shapes():
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


def test_published_files_may_use_other_names_of_keys():
    """Files of Bloom say n_embed and num_attention_heads, those of GPT-2 may say hidden_size."""
    bloom = {"model_type": "bloom", "n_embed": 96, "hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3}
    gpt2 = {"model_type": "gpt2", "hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 3}
    for config in (bloom, gpt2):
        architecture = architecture_from_config(config, "names")
        assert (architecture.hidden, len(architecture.layers), architecture.layers[0].heads) == (96, 3, 6)
        assert described_counts(architecture) == module_counts(build(config, "meta"))
    ignored = {"model_type": "gpt2", "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 8}
    assert architecture_from_config(ignored, "") == architecture_from_config({"model_type": "gpt2"}, "")


def test_describing_a_planned_family_needs_no_torch(run_python):
    source = """
import sys
import moreh.models.describe.from_source
architecture = moreh.models.describe.from_source.describe(sys.argv[1])
print(architecture.parameters, [name for name in ("torch", "transformers") if name in sys.modules])
"""
    finished = run_python(source, MODELS / "llama3_70b.json")
    assert finished.stdout == "70553706496 []\n", finished.stderr
