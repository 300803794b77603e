"""The tanh-GELU in one operation beside the one of transformers."""

import math
from unittest import mock

import pytest
import torch
from transformers.activations import NewGELUActivation

from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.kernels import gelu, row_chunks
from moreh.runtime.kernels.faster_kernels import FasterKernels
from tests.helpers.compare import worst

ROWS, SIZE = 7, 143


def bound(module):
    """Within it the module computes with our kernel."""
    return FasterKernels(module, DEFAULT_OPTIONS).bound()


def test_equals_the_activation_of_transformers_but_for_rounding():
    module = NewGELUActivation()
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    expected = module(x)
    with bound(module):
        actual = module(x)
        assert not torch.equal(actual, expected), "the same kernel was used"
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(module(x), expected)


def bfloat16_errors():
    """The largest relative errors of the output, rounded once (2**-8), and of the gradient, which is rounded twice."""
    x = torch.linspace(-8, 8, ROWS * SIZE).bfloat16().view(ROWS, SIZE).requires_grad_()
    module = NewGELUActivation()
    with bound(module):
        output = module(x)
    x_exact = x.detach().double().requires_grad_()
    # Not 1 + tanh, of which little is left at the negative end.
    exact = x_exact * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x_exact + 0.044715 * x_exact**3))
    grad_output = torch.randn(x.shape).bfloat16()
    grad = torch.autograd.grad(output, x, grad_output)[0]
    exact_grad = torch.autograd.grad(exact, x_exact, grad_output.double())[0]
    return [worst((a / b - 1).detach()[b != 0].abs()) for a, b in ((output, exact), (grad, exact_grad))]


@pytest.mark.parametrize("chunk_elements", [1, 3 * SIZE, row_chunks.CHUNK_ELEMENTS])
def test_bfloat16_is_exact_to_rounding(monkeypatch, chunk_elements):
    monkeypatch.setattr(row_chunks, "CHUNK_ELEMENTS", chunk_elements)
    output_error, grad_error = bfloat16_errors()
    assert output_error < 2**-7.9
    assert grad_error < 2**-6.9


def test_comparison_finds_the_sigmoid_approximation(monkeypatch):
    """That of the sigmoid alone, without the cubic term."""
    monkeypatch.setattr(gelu, "_CUBIC", 0.0)
    assert min(bfloat16_errors()) > 0.1


def nan_in_output(x):
    return gelu._Gelu.apply(x).index_fill(1, torch.tensor(5), float("nan"))


def nan_in_gradient(x):
    y = x.clone()
    y.register_hook(lambda grad: grad.index_fill(1, torch.tensor(5), float("nan")))
    return gelu._Gelu.apply(y)


@pytest.mark.parametrize(("broken", "index"), [(nan_in_output, 0), (nan_in_gradient, 1)])
def test_comparison_finds_a_nan(broken, index):
    with mock.patch.object(gelu, "fused_forward", lambda module, x: broken(x)):
        assert bfloat16_errors()[index] == math.inf


def test_saves_the_derivative_only():
    """Not the input, and nothing where no gradient is needed."""
    module, x, saved = NewGELUActivation(), torch.randn(3, 5).bfloat16(), []
    with bound(module), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
        assert saved == []
        module(x.requires_grad_())
    assert len(saved) == 1
