"""Describing what a user names: files, directories, other families of transformers, and everything that is refused."""

import dataclasses
import json

import pytest

from moreh.errors import PlanError
from moreh.models.describe.from_config import architecture_from_config
from moreh.models.describe.from_source import describe, describe_config
from moreh.models.families import planned_families
from tests.conftest import ROOT
from tests.helpers.models.tiny_models import (
    build,
    described_counts,
    first_module_list,
    module_counts,
    name_case,
    tiny_config_of,
)

MODELS = ROOT / "configs" / "models"

# Families without an architecture in the registry: transformers builds them.
OTHER_CASES = [
    ("olmo", {"num_key_value_heads": 2}),
    ("stablelm", {"num_key_value_heads": 2, "use_qkv_bias": True}),
    ("cohere", {"num_key_value_heads": 2}),
    ("qwen3_moe", {"num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}),
    ("gpt_oss", {"num_key_value_heads": 2, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("gpt_bigcode", {"n_inner": 80}),
]


@pytest.mark.parametrize(("family", "changes"), OTHER_CASES, ids=name_case)
def test_other_families_are_built_by_transformers(family, changes, tmp_path):
    assert family not in planned_families()
    config = tiny_config_of(family, changes)
    model = build(config)
    path = tmp_path / f"tiny_{family}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    architecture = describe(path)
    assert architecture.name == f"tiny_{family}"
    assert described_counts(architecture) == module_counts(model)
    assert [layer.parameters for layer in architecture.layers] == [
        module_counts(layer)[0] for layer in first_module_list(model)
    ]
    splits = [linear.split for linear in architecture.layers[0].linears]
    assert splits.count("column") >= 2
    assert splits.count("row") == 2
    assert architecture.layers[0].kv_heads == (1 if family == "gpt_bigcode" else 2)
    if "moe" in family or "oss" in family:
        expert = architecture.layers[0].linears[-1 if "oss" in family else -2]
        assert (expert.copies, expert.stacked, expert.inputs) == (
            changes.get("num_experts", 4),
            True,
            80 if "oss" in family else 24,
        )


def test_files_directories_and_names_are_sources(tmp_path):
    content = (MODELS / "gpt2.json").read_text(encoding="utf-8")
    directory = tmp_path / "my-model"
    directory.mkdir()
    (directory / "config.json").write_text(content, encoding="utf-8")
    expected = describe(str(MODELS / "gpt2.json"))
    for source in (directory, str(directory), directory / "config.json"):
        assert describe(source) == dataclasses.replace(expected, name="my-model")
    with pytest.raises(PlanError, match=r"^no-such/model: it is neither a file or directory here nor a model") as error:
        describe("no-such/model")
    assert "\n" not in str(error.value)


BAD_CONFIGS = [
    ({}, "there is no model_type: add it"),
    ({"model_type": None}, "model_type is None: give the name of a family"),
    ({"model_type": ["gpt2"]}, r"model_type is \['gpt2'\]: give the name"),
    ({"model_type": "gpt2", "n_layer": "12"}, "n_layer is '12': give a whole number of at least 1"),
    ({"model_type": "gpt2", "n_layer": 12.0}, "n_layer is 12.0: give a whole number"),
    ({"model_type": "gpt2", "n_layer": True}, "n_layer is True: give a whole number"),
    (
        {"model_type": "gpt2", "n_layer": 10**9},
        "n_layer is 1000000000: give a whole number of at least 1 and at most 10000",
    ),
    ({"model_type": "gpt2", "n_embd": 0}, "n_embd is 0: give a whole number of at least 1"),
    ({"model_type": "gpt2", "n_embd": -768}, "n_embd is -768: give"),
    ({"model_type": "gpt2", "n_embd": None}, "n_embd is None: give"),
    ({"model_type": "gpt2", "n_head": 7}, "n_head is 7: give a divisor of the width, 768"),
    ({"model_type": "gpt2", "vocab_size": -1}, "vocab_size is -1: give"),
    ({"model_type": "gpt2", "n_inner": 0}, "n_inner is 0: give"),
    ({"model_type": "gpt2", "attn_pdrop": "much"}, "attn_pdrop is 'much': give a probability from 0 to 1"),
    ({"model_type": "gpt2", "resid_pdrop": 1.5}, "resid_pdrop is 1.5: give a probability"),
    ({"model_type": "gpt2", "tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes': give true or false"),
    ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention is True: give false"),
    ({"model_type": "gpt2", "is_encoder_decoder": True}, "is_encoder_decoder is True: give a decoder-only"),
    ({"model_type": "llama", "intermediate_size": None}, "intermediate_size is None: give"),
    (
        {"model_type": "llama", "num_attention_heads": 33},
        "num_attention_heads is 33: give a divisor of the width, 4096, or give head_dim",
    ),
    (
        {"model_type": "llama", "num_key_value_heads": 5},
        "num_key_value_heads is 5: give a divisor of the 32 attention heads",
    ),
    ({"model_type": "llama", "head_dim": -1}, "head_dim is -1: give"),
    (
        {"model_type": "qwen2", "layer_types": ["full_attention"], "use_sliding_window": True},
        "layer_types is .*: give a list of 32",
    ),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1: give"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0: give"),
    ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok is 9: give at most the 8 experts"),
    ({"model_type": "mixtral", "num_local_experts": 0}, "num_local_experts is 0: give"),
    ({"model_type": "no-such-family"}, "transformers builds no causal language model of model_type 'no-such-family'"),
    ({"model_type": "t5"}, "of model_type 't5' from it .it has an encoder and a decoder.: give"),
    ({"model_type": "bert"}, "of model_type 'bert' is not a decoder with an output layer"),
    ({"model_type": "vit"}, "of model_type 'vit' is not a decoder with an output layer"),
    ({"model_type": "bart"}, "it has an encoder and a decoder.: give the configuration"),
    ({"model_type": "mamba", "num_hidden_layers": 1}, "of model_type 'mamba' has no attention heads"),
    ({"model_type": "olmo", "num_hidden_layers": 0}, "has no list of layers"),
    (
        {"model_type": "olmo", "hidden_size": "wide"},
        "transformers builds no causal language model of model_type 'olmo'",
    ),
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_configurations_that_cannot_be_meant_are_refused(config, message):
    with pytest.raises(PlanError, match=message) as error:
        describe_config(config, "given")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_other_families_are_not_planned_without_transformers():
    with pytest.raises(PlanError, match=r"model_type is 'olmo': give one of (\w+, )+"):
        architecture_from_config({"model_type": "olmo"}, "given")


BAD_FILES = [
    (b"{", "it is not JSON"),
    (b"", "it is not JSON"),
    (b"\xff\xfe{}", "it is not JSON"),
    (b"[1, 2]", "it holds a list: give a JSON object"),
    (b'"gpt2"', "it holds a str: give a JSON object"),
    (b"[" * 100_000, "it is not JSON"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES, ids=lambda value: str(value)[:12])
def test_files_that_are_no_json_object_are_refused(content, message, tmp_path):
    path = tmp_path / "model.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message) as error:
        describe(path)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    for source in (tmp_path / "none.json", str(tmp_path / "none.json"), tmp_path, tmp_path / "none"):
        with pytest.raises(PlanError, match=r"there is no such file: give a model's config\.json"):
            describe(source)
    for source in ("x" * 5000, "a\0b"):
        with pytest.raises(PlanError) as error:
            describe(source)
        assert "\n" not in str(error.value)


def test_messages_name_the_path_that_was_given(tmp_path):
    path = tmp_path / "model.json"
    for config in ({"model_type": "gpt2", "n_layer": 0}, {"model_type": "bert"}, {}):
        path.write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(PlanError, match=rf"^{path}: "):
            describe(path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(PlanError, match=rf"^{tmp_path}/config.json: there is no model_type"):
        describe(tmp_path)


@pytest.mark.parametrize("source", ["", "  ", "a b", "a\nb", "a\nb.json", "a/b/c", "/nowhere/gpt2"])
def test_names_that_the_hub_does_not_allow_are_not_looked_for(source, monkeypatch):
    monkeypatch.setattr(
        "moreh.models.describe.from_source._hub_config", lambda name: pytest.fail(f"{name} was looked for")
    )
    with pytest.raises(PlanError, match=r"\A[^\n]+\Z") as error:
        describe(source)
    assert str(error.value).startswith((f"{source}: ", f"{source!r}: "))


def test_file_of_this_repository_is_suggested_for_its_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("gpt2", "openai-community/gpt2"):
        with pytest.raises(
            PlanError, match=r"HF_HUB_OFFLINE is set.*: give configs/models/gpt2\.json, or unset HF_HUB_OFFLINE$"
        ):
            describe(name)
