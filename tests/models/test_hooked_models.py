"""Hooks of a script, which see whole batches as in plain transformers, on whatever they are registered."""

import pytest
import torch
from torch import nn

from tests.helpers.fast_path_cases import batch
from tests.helpers.models.families import make_model
from tests.helpers.plain_comparison import compare

pytestmark = pytest.mark.usefixtures("few_label_positions")


def on_layer(model, seen):
    return model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))


def before_layer(model, seen):
    return model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))


def on_output_layer(model, seen):
    return model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))


def on_all_modules(model, seen):
    def hook(module, args, output):
        if isinstance(module, nn.Linear):
            seen.append(output)

    return nn.modules.module.register_module_forward_hook(hook)


HOOKS = [on_layer, before_layer, on_output_layer, on_all_modules]


@pytest.mark.parametrize("register", HOOKS)
def test_losses_of_hooked_features_have_their_gradient(register):
    def script(model, call):
        losses, seen = [], []
        losses.append(call(model).loss)
        handle = register(model, seen)
        try:
            losses.append(call(model).loss)
        finally:
            handle.remove()
        losses.append(call(model).loss)
        penalty = sum(features.square().mean() for features in seen)
        (sum(losses) + penalty).backward()
        return torch.stack([*losses, penalty])

    difference, took = compare(script, lambda: make_model("llama", tie_word_embeddings=True))
    assert difference < 1e-9
    assert took == [True, False, True]


def scale_output(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * output.shape[1])


def scale_gradient_of_a_parameter(model):
    model.lm_head.weight.register_hook(lambda gradient: gradient.sign())


def scale_gradient_of_a_module(model):
    model.model.layers[0].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0].sign(),))


@pytest.mark.parametrize("change", [scale_output, scale_gradient_of_a_parameter, scale_gradient_of_a_module])
def test_hooks_that_change_values_change_those_of_whole_batches(change):
    def script(model, call):
        call(model).loss.backward()
        change(model)
        call(model).loss.backward()

    difference, took = compare(script)
    assert difference < 1e-9
    assert took == [True, False]


@pytest.mark.parametrize("late", [False, True], ids=["before the first call", "between calls"])
@pytest.mark.parametrize("kind", ["register_hook", "register_prehook"])
def test_hooks_on_the_accumulation_of_gradients_run_once_a_backward_pass(kind, late):
    """As Megatron's buffers of gradients in another type."""

    def script(model, call):
        nodes, calls = [], []

        def register():
            for parameter in model.parameters():
                node = parameter.view_as(parameter).grad_fn.next_functions[0][0]
                getattr(node, kind)(lambda *args: calls.append(None))
                nodes.append(node)

        if late:
            call(model).loss.backward()
        register()
        for _ in range(2):
            call(model).loss.backward()
        return float(len(calls))

    difference, took = compare(script)
    assert difference < 1e-9
    assert took == [*([True] if late else []), False, False]


def require_gradients(model, call):
    model.enable_input_require_grads()


def ask_for_hidden_states(model, call):
    assert len(call(model, **batch(model), output_hidden_states=True).hidden_states) > 1


@pytest.mark.parametrize(("prepare", "took"), [(require_gradients, [True]), (ask_for_hidden_states, [False, True])])
def test_hooks_of_transformers_that_change_nothing_keep_the_fast_path(prepare, took):
    def script(model, call):
        prepare(model, call)
        assert any(module._forward_hooks for module in model.modules())
        call(model).loss.backward()

    difference, actual = compare(script)
    assert difference < 1e-9
    assert actual == took
