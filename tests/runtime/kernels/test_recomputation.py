"""Activation recomputation: for which modules it is switched on, what is saved, and that gradients stay the same."""

import pytest
import torch
from torch import nn

from moreh.errors import OptionError
from moreh.runtime.kernels.recomputation import recompute_activations
from tests.helpers.compare import worst_of_names
from tests.helpers.tensor_cases import whole_model

IDS = torch.arange(20).view(2, 10) + 4


def tiny():
    return whole_model("llama", {})


def gradients_and_saved_elements(model):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients, sum(saved)


def test_saves_less_and_computes_the_same_gradients():
    expected, without = gradients_and_saved_elements(tiny())
    saved = {}
    for kind in ("full", "selective"):
        model = tiny()
        recompute_activations(model, kind)
        gradients, saved[kind] = gradients_and_saved_elements(model)
        assert worst_of_names(gradients, expected) < 1e-6
    assert max(saved.values()) < without


def test_models_inside_a_module_of_the_script_recompute():
    model = tiny()
    recompute_activations(nn.ModuleDict({"policy": model, "head": nn.Linear(2, 2)}), "full")
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_module_without_layers_is_left_alone():
    recompute_activations(nn.Embedding(3, 2), "full")


def test_module_without_a_transformers_model_is_refused():
    with pytest.raises(OptionError, match="Sequential is not a transformers model"):
        recompute_activations(nn.Sequential(nn.Linear(2, 2)), "full")


def test_model_without_support_is_refused_by_name(monkeypatch):
    model = tiny()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(OptionError, match=r"LlamaForCausalLM does not support .* activation_recomputation=False"):
        recompute_activations(model, "full")
