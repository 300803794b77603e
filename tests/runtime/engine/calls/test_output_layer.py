"""The second pass of a custom loss computes no outputs of the output layer where the gradients do not need them."""

import pytest
import torch
from torch import nn

from moreh.runtime.engine.calls.output_layer import OutputLayer, with_gradient
from tests.helpers.models.families import PP_TP, make_model
from tests.helpers.sharded import own_losses
from tests.helpers.workers import run_on_workers

TP_SHARDED = {"stage_layers": (3,), "tensor": 2, "data": 2, "micro_batch_size": 2, "sharding": "parameters"}
# Their logits are the outputs of the output layer, scaled or capped.
CHANGED = ("cohere", "gemma2", "granite")


@pytest.mark.parametrize("plan", [PP_TP, TP_SHARDED], ids=["pp-tp", "tp-sharded"])
def test_outputs_are_left_out_where_they_are_the_logits(plan):
    assert any(run_on_workers(own_losses.leaves_out_outputs, [("llama", plan)], size=4)[0])


@pytest.mark.parametrize("family", CHANGED)
def test_scaled_and_capped_logits_are_computed(family):
    plan = {"stage_layers": (3,), "tensor": 2, "micro_batch_size": 2}
    for curve_difference, weight_difference in run_on_workers(
        own_losses.compare, [("label_smoothing", family, plan)], size=2
    )[0]:
        assert max(curve_difference, weight_difference) < 1e-9
    assert not any(run_on_workers(own_losses.leaves_out_outputs, [(family, plan)], size=2)[0])


def test_comparison_finds_capped_logits_that_are_left_out():
    plan = {"stage_layers": (3,), "tensor": 2, "micro_batch_size": 2}
    results = run_on_workers(own_losses.compare_without_comparison, [("label_smoothing", "gemma2", plan)], size=2)[0]
    assert all(weight_difference > 1e-6 for _, weight_difference in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_gradients_are_those_of_the_layer(dtype, bias, autocast):
    causal = make_model("llama").to(dtype)
    causal.lm_head = nn.Linear(causal.config.hidden_size, causal.config.vocab_size, bias=bias, dtype=dtype)
    layer = OutputLayer(causal)
    hidden = torch.randn(2, 3, causal.config.hidden_size, dtype=dtype, requires_grad=True)
    parameters = [hidden, *causal.lm_head.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = causal.lm_head(hidden)
        grad = torch.randn_like(logits)
        expected = torch.autograd.grad((logits * grad).sum(), parameters)
        with layer.without_outputs():
            empty = causal.lm_head(hidden)
    assert (empty.shape, empty.dtype) == (logits.shape, logits.dtype)
    assert not empty.any()
    assert empty.untyped_storage().nbytes() == empty.element_size()
    for ours, theirs in zip(torch.autograd.grad(with_gradient(empty, grad), parameters), expected, strict=True):
        assert torch.equal(ours, theirs)


def hook_of_the_layer(causal):
    return causal.lm_head.register_forward_hook(lambda *arguments: None).remove


def hook_of_the_model(causal):
    return causal.register_forward_hook(lambda *arguments: None).remove


def hook_of_all_modules(causal):
    return torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None).remove


def forward_of_the_script(causal):
    causal.lm_head.forward = lambda hidden: nn.Linear.forward(causal.lm_head, hidden)
    return lambda: None


def class_of_the_script(causal):
    causal.__class__ = type("Own", (type(causal),), {"forward": lambda self, *args, **kwargs: None})
    return lambda: None


@pytest.mark.parametrize(
    "look",
    [hook_of_the_layer, hook_of_the_model, hook_of_all_modules, forward_of_the_script, class_of_the_script],
)
def test_outputs_that_a_script_may_read_are_computed(look):
    causal = make_model("llama")
    layer = OutputLayer(causal)
    hidden = torch.randn(2, 3, causal.config.hidden_size, dtype=torch.float64)
    stop = look(causal)
    try:
        with layer.without_outputs():
            assert causal.lm_head(hidden).any()
    finally:
        stop()


def test_layer_is_restored_after_an_error():
    causal = make_model("llama")
    layer = OutputLayer(causal)
    with pytest.raises(KeyboardInterrupt), layer.without_outputs():
        raise KeyboardInterrupt
    assert "forward" not in causal.lm_head.__dict__
    with pytest.raises(KeyboardInterrupt), layer.observed():
        raise KeyboardInterrupt
    assert not causal.lm_head._forward_hooks
