"""The tanh-GELU in one operation beside the one of transformers."""

import math

import pytest
import torch
from transformers.activations import NewGELUActivation

from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.kernels import gelu as activation
from moreh.runtime.kernels import row_chunks as chunks
from moreh.runtime.kernels.faster_kernels import FasterKernels
from tests.helpers.compare import worst


def fused(module):
    """Within it the module computes with our kernel."""
    return FasterKernels(module, DEFAULT_OPTIONS).bound()


def test_gelu():
    module = NewGELUActivation()
    given = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    written_out = module(given)
    with fused(module):
        seen = module(given)
        assert not torch.equal(seen, written_out), "the other kernel was used"
    torch.testing.assert_close(seen, written_out, rtol=1e-12, atol=1e-12)
    assert torch.equal(module(given), written_out)


def gelu_in_bfloat16():
    """The largest relative errors of the output, where rounding makes 2**-8, and of the gradient, which is rounded twice."""
    given = torch.linspace(-8, 8, 1001).bfloat16().view(7, 143).requires_grad_()
    module = NewGELUActivation()
    with fused(module):
        seen = module(given)
    exact_given = given.detach().double().requires_grad_()
    # Not 1 + tanh, of which little is left at the negative end.
    exact = exact_given * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (exact_given + 0.044715 * exact_given**3))
    arriving = torch.randn(given.shape).bfloat16()
    gradient = torch.autograd.grad(seen, given, arriving)[0]
    exact_gradient = torch.autograd.grad(exact, exact_given, arriving.double())[0]
    return [worst((a / b - 1).detach()[b != 0].abs()) for a, b in ((seen, exact), (gradient, exact_gradient))]


@pytest.mark.parametrize("chunk", [1, 3 * 143, chunks.CHUNK])
def test_gelu_in_bfloat16(monkeypatch, chunk):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    of_output, of_gradient = gelu_in_bfloat16()
    assert of_output < 2**-7.9
    assert of_gradient < 2**-6.9


def test_gelu_comparison_finds_another_approximation(monkeypatch):
    """That of sigmoid alone, without the cubic term."""
    monkeypatch.setattr(activation, "_CUBIC", 0.0)
    assert min(gelu_in_bfloat16()) > 0.1


def test_gelu_keeps_the_derivative_only():
    """Not what is given besides, and nothing where no gradient is asked for."""
    module, given, kept = NewGELUActivation(), torch.randn(3, 5).bfloat16(), []
    with fused(module), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(given)
        assert kept == []
        module(given.requires_grad_())
    assert len(kept) == 1
