"""Activations in fewer operations beside those of transformers."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from moreh.runtime.kernels import gelu as activation
from moreh.runtime.kernels import row_chunks as chunks
from moreh.runtime.kernels.gelu import fused_activation

INNER = 24


def test_gelu():
    module = NewGELUActivation()
    given = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    written_out = module(given)
    with fused_activation():
        fused = module(given)
        assert not torch.equal(fused, written_out), "the other kernel was used"
    torch.testing.assert_close(fused, written_out, rtol=1e-12, atol=1e-12)
    assert torch.equal(module(given), written_out)


def gelu_in_bfloat16():
    """The largest relative errors of the output, where rounding makes 2**-8, and of the gradient, which is rounded twice."""
    given = torch.linspace(-8, 8, 1001).bfloat16().view(7, 143).requires_grad_()
    with fused_activation():
        seen = NewGELUActivation()(given)
    exact_given = given.detach().double().requires_grad_()
    # Not 1 + tanh, of which little is left at the negative end.
    exact = exact_given * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (exact_given + 0.044715 * exact_given**3))
    arriving = torch.randn(given.shape).bfloat16()
    gradient = torch.autograd.grad(seen, given, arriving)[0]
    exact_gradient = torch.autograd.grad(exact, exact_given, arriving.double())[0]
    return [float((a / b - 1).detach()[b != 0].abs().max()) for a, b in ((seen, exact), (gradient, exact_gradient))]


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
    given, kept = torch.randn(3, 5).bfloat16(), []
    with fused_activation(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        NewGELUActivation()(given)
        assert kept == []
        NewGELUActivation()(given.requires_grad_())
    assert len(kept) == 1


def mlp(activation_name="silu"):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=8, intermediate_size=INNER, num_attention_heads=2, hidden_act=activation_name)
    return LlamaMLP(config).double()


def results(module):
    """The output, and the gradients of the input and of the weights."""
    torch.manual_seed(1)
    given = torch.randn(1, 7, 8, dtype=torch.float64, requires_grad=True)
    output = module(given)
    return output, *torch.autograd.grad(output, (given, *module.parameters()), torch.randn_like(output))


def worst(module):
    """The largest difference between transformers' and ours."""
    expected = results(module)
    with fused_activation():
        seen = results(module)
    return max(float((a - b).detach().abs().max()) for a, b in zip(seen, expected, strict=True))


# 7 rows in chunks of 1, of 3, and together.
@pytest.mark.parametrize("chunk", [1, 3 * INNER, chunks.CHUNK])
def test_swiglu(monkeypatch, chunk):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    assert worst(mlp()) < 1e-12


def test_gradients_of_a_part():
    """A frozen weight asks for no product, and the activation is computed by itself; twice through the same graph too."""
    module = mlp()
    module.down_proj.weight.requires_grad_(False)
    given = torch.randn(1, 7, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(module(given).sum(), given)[0]
    with fused_activation():
        output = module(given).sum()
    for _ in range(2):
        torch.testing.assert_close(
            torch.autograd.grad(output, given, retain_graph=True)[0], expected, rtol=1e-12, atol=1e-12
        )


def test_comparison_finds_another_product(monkeypatch):
    """Instead of that which the last linear layer computes again for the gradient of its weight."""
    computed = activation.without_keeping

    def of_another_gate(down, gate, up):
        output = computed(down, gate, up)
        with torch.no_grad():
            gate.detach().data.add_(0.1)
        return output

    monkeypatch.setattr(activation, "without_keeping", of_another_gate)
    assert worst(mlp()) > 1e-3


def test_comparison_finds_swapped_gradients(monkeypatch):
    backward = activation._SwiGlu.backward
    monkeypatch.setattr(
        activation._SwiGlu, "backward", staticmethod(lambda ctx, gradient: (*backward(ctx, gradient)[1::-1], None))
    )
    assert worst(mlp()) > 1e-3


@pytest.mark.parametrize(
    ("name", "recomputed", "expected"), [("silu", False, 2), ("silu", True, 3), ("gelu", False, 4)]
)
def test_what_is_kept(name, recomputed, expected):
    """Gate and up; with other activations, which stay as they are, the activated gate and the product too.

    Where the layer is computed again nothing is hidden from what sees to that.
    """
    module, kept = mlp(name), []
    with (
        fused_activation(recomputed),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        module(torch.randn(1, 7, 8, dtype=torch.float64))
    assert len({tensor.data_ptr() for tensor in kept if tensor.numel() == 7 * INNER}) == expected
