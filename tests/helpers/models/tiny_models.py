"""Tiny models of any family of transformers, and what they consist of."""

from dataclasses import fields

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from moreh.models.families import FAMILIES

# Odd sizes: no two of hidden, inner, heads and vocabulary are easily taken for each other.
TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def name_case(case):
    """The id of a test case: the changes of a configuration as KEY=VALUE."""
    return case if isinstance(case, str) else ",".join(f"{key}={value}" for key, value in case.items()) or "plain"


def names_of_keys(family):
    """transformers' names for the keys of a family's record, {key: name}; None for a key that the family lacks."""
    keys = FAMILIES[family].config_keys if family in FAMILIES else None
    if keys is None:
        return {}
    # transformers knows n_embed of published files, but its classes do not have it as a field.
    return {key: alias for alias, key in keys.aliases.items() if alias != "n_embed"} | dict(keys.renamed)


def tiny_config_of(family, changes):
    """A configuration as in a file of the family, with its own names of the keys."""
    names = names_of_keys(family)
    sizes = {names.get(key) or key: value for key, value in TINY.items()}
    if family == "gpt_bigcode":
        sizes["n_positions"] = sizes.pop("max_position_embeddings")
    return {"model_type": family} | sizes | changes


def require_family(family):
    """Skip a test of a family that the installed transformers does not have yet."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")


def build(config, device="cpu"):
    """The model that transformers builds of a configuration, always with the same random weights."""
    require_family(config["model_type"])
    settings = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))


def module_counts(module):
    """Parameters, trainable ones, and the tensors that those are in, as the module has them."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return (
        sum(parameter.numel() for parameter in module.parameters()),
        sum(parameter.numel() for parameter in trainable),
        len(trainable),
    )


def described_counts(architecture):
    """The same, as an architecture says it."""
    return architecture.parameters, architecture.trainable_parameters, architecture.trainable_tensors


def first_module_list(model):
    """The layers of a tiny model, found in another way than the code under test finds them."""
    return next(part for part in model.modules() if isinstance(part, nn.ModuleList))


def differing_fields(actual, expected):
    """The fields in which two architectures differ, names aside: {field: (actual value, expected value)}."""
    pairs = {field.name: (getattr(actual, field.name), getattr(expected, field.name)) for field in fields(actual)}
    return {name: pair for name, pair in pairs.items() if name != "name" and pair[0] != pair[1]}
