"""Gradients of weights that zero-bubble schedules compute later, in the stage for torch before 2.13."""

import copy

import torch
from torch import nn

from moreh.runtime.pipeline.older_torch import OlderPipelineStage
from tests.helpers.compare import relative_difference


class TwoProducts(torch.autograd.Function):
    """`x * weight` and `x * weight**2`, in one node of the graph that is a function of Python's."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight, x * weight**2

    @staticmethod
    def backward(ctx, grad_first, grad_second):
        x, weight = ctx.saved_tensors
        grad_x = grad_first * weight + grad_second * weight**2
        return grad_x, (grad_first * x + grad_second * x * 2 * weight).sum(0)


class Layers(nn.Module):
    """Layers with a node of two outputs, a weight that is used twice, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6, dtype=torch.float64)
        self.frozen = nn.Linear(6, 6, dtype=torch.float64).requires_grad_(False)
        # The last of the parameters: the nodes of the others, which own its node, have been used by then.
        self.products = nn.ParameterList([torch.randn(6, dtype=torch.float64)])

    def forward(self, x):
        first, second = TwoProducts.apply(x, self.products[0])
        for _ in range(2):
            first = self.shared(first).tanh()
        return self.frozen(first + second.sin())


def gradients_in_two_passes(layers, batches):
    """Accumulate the gradients of batches, those of all inputs before those of the weights; returns the former."""
    stage = OlderPipelineStage.__new__(OlderPipelineStage)
    stage.submod = layers
    input_grads, left = [], []
    for x, grad_output in batches:
        kwargs = {"stage_output": (layers(x),), "output_grads": (grad_output,), "input_values": [x]}
        (input_grad,), groups = stage.backward_maybe_with_nosync("input", kwargs)
        input_grads.append(input_grad)
        left.append(groups)
        del kwargs
    for groups in left:
        stage.backward_maybe_with_nosync("weight", {"param_groups": groups})
    return input_grads


def test_gradients_in_two_passes_are_those_of_one():
    torch.manual_seed(0)
    layers = Layers()
    whole = copy.deepcopy(layers)
    batches = [
        (torch.randn(3, 6, dtype=torch.float64, requires_grad=True), torch.randn(3, 6, dtype=torch.float64))
        for _ in range(2)
    ]
    input_grads = gradients_in_two_passes(layers, batches)
    for (x, grad_output), input_grad in zip(batches, input_grads, strict=True):
        x.grad = None
        whole(x).backward(grad_output)
        assert relative_difference(input_grad, x.grad) < 1e-12
    for name, parameter in whole.named_parameters():
        grad = layers.get_parameter(name).grad
        if parameter.requires_grad:
            assert relative_difference(grad, parameter.grad) < 1e-12, name
        else:
            assert grad is None
