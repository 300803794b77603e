"""Architectures of built models are exact: adapters, frozen parts, experts, wrappers, bytes of a training step."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoConfig, GPT2Model
from transformers.pytorch_utils import Conv1D

from moreh.errors import PlanError
from moreh.models.describe.from_config import architecture_from_config
from moreh.models.describe.from_module import describe_module
from tests.helpers.models.tiny_models import (
    build,
    described_counts,
    first_module_list,
    module_counts,
    name_case,
    tiny_config_of,
)


class Lora(nn.Module):
    """A LoRA adapter around a matrix, with the names of PEFT."""

    def __init__(self, base_layer, rank=3):
        super().__init__()
        inputs, outputs = base_layer.weight.shape if isinstance(base_layer, Conv1D) else base_layer.weight.shape[::-1]
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class PeftLike(nn.Module):
    """A wrapper with PEFT's way to the model inside."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model
        self.config = model.config

    def get_base_model(self):
        return self.base_model


def add_lora(model, *suffixes):
    model.requires_grad_(False)
    for name, part in list(model.named_modules()):
        if name.endswith(suffixes):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Lora(part))
    return model


def freeze_embedding(model):
    model.get_input_embeddings().requires_grad_(False)


def freeze_head(model):
    model.get_output_embeddings().requires_grad_(False)


def freeze_layers(model):
    for layer in first_module_list(model)[:2]:
        layer.requires_grad_(False)


def train_biases_only(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))


def freeze_biases(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("bias"))


def freeze_all(model):
    model.requires_grad_(False)


def train_norms_only(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "ln_" in name)


FREEZERS = [
    freeze_embedding,
    freeze_head,
    freeze_layers,
    train_biases_only,
    freeze_biases,
    freeze_all,
    train_norms_only,
]


@pytest.mark.parametrize("freeze", FREEZERS, ids=lambda freeze: freeze.__name__)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("phi", {}),
        ("phi", {"tie_word_embeddings": True}),
        ("mixtral", {"num_key_value_heads": 2}),
    ],
    ids=name_case,
)
def test_frozen_parameters_are_counted_as_frozen(family, changes, freeze):
    config = tiny_config_of(family, changes)
    model = build(config, "meta")
    freeze(model)
    architecture = describe_module(model)
    assert described_counts(architecture) == module_counts(model)
    assert architecture.parameters == architecture_from_config(config, "").parameters
    for layer, part in zip(architecture.layers, first_module_list(model), strict=True):
        assert (layer.parameters, layer.trainable_parameters, layer.trainable_tensors) == module_counts(part)


@pytest.mark.parametrize("wrap", [lambda model: model, PeftLike], ids=["bare", "wrapped"])
@pytest.mark.parametrize(
    ("family", "adapted"),
    [
        ("llama", ("q_proj", "v_proj")),
        ("llama", ("down_proj", "lm_head")),
        ("gpt2", ("c_attn", "mlp.c_proj")),
        ("phi", ("dense",)),
    ],
)
def test_lora_adapters_are_matrices_that_are_not_split(family, adapted, wrap):
    config = tiny_config_of(family, {})
    plain = architecture_from_config(config, "")
    model = wrap(add_lora(build(config), *adapted))
    architecture = describe_module(model)
    assert described_counts(architecture) == module_counts(model)
    assert 0 < architecture.trainable_parameters < architecture.parameters / 2
    layer = architecture.layers[0]
    own = [linear for linear in layer.linears if "lora" not in linear.name]
    adapters = [linear for linear in layer.linears if "lora" in linear.name]
    assert [dataclasses.replace(linear, frozen=False) for linear in own] == list(plain.layers[0].linears)
    assert all(linear.frozen for linear in own)
    assert {(linear.split, linear.frozen) for linear in adapters} == {("none", False)}
    assert len(adapters) == 2 * sum(linear.name.endswith(adapted) for linear in own)
    assert (layer.heads, layer.kv_heads, layer.head_dim) == (4, 4, 12)


def test_adapters_may_be_bare_parameters():
    config = tiny_config_of("llama", {})
    model = build(config)
    for layer in first_module_list(model):
        layer.self_attn.lora_A = nn.Parameter(torch.zeros(3, 48))
        layer.self_attn.lora_B = nn.Parameter(torch.zeros(48, 3))
    architecture = describe_module(model)
    assert described_counts(architecture) == module_counts(model)
    assert [(linear.inputs, linear.outputs) for linear in architecture.layers[0].linears if "lora" in linear.name] == [
        (48, 3),
        (3, 48),
    ]


def test_experts_may_be_modules_of_a_list():
    """There are more of them than layers."""
    model = build(tiny_config_of("mixtral", {"num_key_value_heads": 2, "num_local_experts": 5}))
    for layer in first_module_list(model):
        layer.mlp.experts = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(48, 80), "down_proj": nn.Linear(80, 48)}) for _ in range(5)
        )
    architecture = describe_module(model)
    assert described_counts(architecture) == module_counts(model)
    experts = architecture.layers[0].linears[-2:]
    assert [(linear.name, linear.copies, linear.active, linear.tensors) for linear in experts] == [
        ("mlp.experts.*.up_proj", 5, 2, 10),
        ("mlp.experts.*.down_proj", 5, 2, 10),
    ]


def test_wrappers_of_torch_are_looked_through():
    model = build(tiny_config_of("llama", {}))
    plain = describe_module(model)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

    assert describe_module(Wrapper()) == plain
    assert describe_module(torch.compile(model)) == plain


TRAINED = [
    ("gpt2", {}, None),
    ("gpt2", {}, freeze_embedding),
    ("gptj", {"rotary_dim": 4}, None),
    ("gpt_neox", {}, None),
    ("opt", {}, None),
    ("bloom", {}, None),
    ("falcon", {}, None),
    ("llama", {"tie_word_embeddings": True}, None),
    ("llama", {}, lambda model: add_lora(model, "q_proj", "v_proj")),
    ("mixtral", {"num_key_value_heads": 2}, None),
    ("qwen3", {"num_key_value_heads": 2}, freeze_layers),
    ("phi", {"qk_layernorm": True}, train_biases_only),
    ("starcoder2", {"num_key_value_heads": 2}, None),
]


@pytest.mark.parametrize(("family", "changes", "prepare"), TRAINED)
def test_bytes_of_a_training_step_follow_from_the_architecture(family, changes, prepare):
    """4 bytes a parameter for weights and gradients each, 8 for AdamW's moments, and 4 a tensor for its step."""
    model = build(tiny_config_of(family, changes)).float()
    if prepare is not None:
        prepare(model)
    architecture = describe_module(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    tokens = torch.randint(0, 97, (2, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    gradients = [parameter.grad for parameter in trainable if parameter.grad is not None]
    assert sum(parameter.nbytes for parameter in model.parameters()) == 4 * architecture.parameters
    assert sum(gradient.nbytes for gradient in gradients) == 4 * architecture.trainable_parameters
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    expected = 8 * architecture.trainable_parameters + 4 * architecture.trainable_tensors
    assert sum(value.nbytes for value in state) == expected


def test_modules_that_are_no_decoders_are_refused():
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=32, n_head=2, vocab_size=64)
    shared = build(tiny_config_of("llama", {}))
    layers = first_module_list(shared)
    layers[1].mlp = layers[0].mlp
    resized = build(tiny_config_of("llama", {}))
    resized.lm_head = nn.Linear(48, 11, bias=False)
    cases = [
        (nn.Linear(2, 2), "Linear has no configuration of transformers"),
        (GPT2Model(config), "GPT2Model has no output layer over its vocabulary"),
        (shared, "LlamaForCausalLM has .* whose layers share or pack none"),
        (resized, r"token embedding and of its output layer are \[97, 48\] and \[11, 48\]"),
    ]
    for module, message in cases:
        with pytest.raises(PlanError, match=message) as error:
            describe_module(module)
        assert "\n" not in str(error.value)
