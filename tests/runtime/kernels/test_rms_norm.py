"""Our RMSNorm beside the one of transformers, and when a module computes with it."""

from unittest import mock

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.kernels import rms_norm, row_chunks
from moreh.runtime.kernels.faster_kernels import FasterKernels
from tests.helpers import compare
from tests.helpers.float64 import exact_float64

SIZE = 24


def make_norm(dtype=torch.float64):
    torch.manual_seed(0)
    module = LlamaRMSNorm(SIZE, eps=1e-3).to(dtype)
    torch.nn.init.normal_(module.weight)
    return module


def output_and_gradients(module, x):
    """The output, and the gradients of the input and of the weight if it is trained."""
    output = module(x)
    torch.manual_seed(1)
    grad_output = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    return output, *torch.autograd.grad(output, [x, *filter(is_trained, module.parameters())], grad_output)


def is_trained(parameter):
    return parameter.requires_grad


def bound(module):
    """Within it the module computes with our kernel."""
    return FasterKernels(module, DEFAULT_OPTIONS).bound()


def worst_difference(module, x):
    """The largest difference between transformers' output and gradients and ours."""
    with exact_float64():
        expected = output_and_gradients(module, x)
        with bound(module):
            actual = output_and_gradients(module, x)
    return compare.worst(compare.max_difference(a, b) for a, b in zip(actual, expected, strict=True))


# 7 rows in chunks of 1, of 3, and together. The weight is frozen where adapters are trained.
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 3 * SIZE, row_chunks.CHUNK_ELEMENTS])
def test_equals_the_norm_of_transformers(monkeypatch, chunk_elements, frozen):
    monkeypatch.setattr(row_chunks, "CHUNK_ELEMENTS", chunk_elements)
    # Not contiguous, as a slice of a longer sequence.
    x = torch.randn(1, 9, SIZE, dtype=torch.float64)[:, 1:8].requires_grad_()
    assert worst_difference(make_norm().requires_grad_(not frozen), x) < 1e-12


def without_epsilon(x, weight, epsilon, dtype, compute=rms_norm.rms_norm):
    return compute(x, weight, 0.0, dtype)


def nan_in_output(x, weight, epsilon, dtype, compute=rms_norm.rms_norm):
    return compute(x, weight, epsilon, dtype).index_fill(2, torch.tensor(5), float("nan"))


def nan_in_weight_gradient(x, weight, epsilon, dtype, compute=rms_norm.rms_norm):
    weight = weight.clone()
    weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor(5), float("nan")))
    return compute(x, weight, epsilon, dtype)


@pytest.mark.parametrize("broken", [without_epsilon, nan_in_output, nan_in_weight_gradient])
def test_comparison_finds_another_mean_and_nans(broken):
    with mock.patch.object(rms_norm, "rms_norm", broken):
        assert worst_difference(make_norm(), torch.randn(1, 7, SIZE, dtype=torch.float64).requires_grad_()) > 1e-4


def test_autocast_gives_bfloat16_outputs_and_float32_gradients():
    """The residual stream stays in float32; what linear layers read is in bfloat16 at once."""
    module, x = make_norm(torch.float32), torch.randn(2, 7, SIZE).requires_grad_()
    exact = output_and_gradients(module, x)
    with torch.autocast("cpu", torch.bfloat16), bound(module):
        actual = output_and_gradients(module, x)
    assert [tensor.dtype for tensor in actual] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.05)


def test_backward_under_autocast_computes_in_float32():
    module, x = make_norm(torch.float32), torch.randn(2, 7, SIZE).requires_grad_()
    output = rms_norm.rms_norm(x, module.weight, 1e-3, torch.float32)
    grad_output = torch.randn(2, 7, SIZE)
    expected = torch.autograd.grad(output, (x, module.weight), grad_output, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(output, (x, module.weight), grad_output)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def elements_saved_with_a_linear_layer(module):
    """What the norm and the linear layer after it save for the backward pass, each storage counted once."""
    x, linear = torch.randn(2, 7, SIZE).requires_grad_(), torch.nn.Linear(SIZE, 5)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with bound(module), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(module(x * 1))
    return sum(tensor.numel() for tensor in saved.values())


@pytest.mark.parametrize(("smallest_weight", "activations"), [(0.1, 1), (0.0, 2)])
def test_saves_what_the_linear_layer_saves_unless_a_weight_is_zero(smallest_weight, activations):
    module = make_norm(torch.float32)
    with torch.no_grad():
        module.weight.clamp_(min=0.1)[0] = smallest_weight
    weights = SIZE + 5 * SIZE
    scales = 2 * 7
    assert elements_saved_with_a_linear_layer(module) == activations * 2 * 7 * SIZE + scales + weights


def test_weight_of_zero_gives_the_gradients_of_transformers():
    module = make_norm()
    with torch.no_grad():
        module.weight[3] = 0
    assert worst_difference(module, torch.randn(1, 7, SIZE, dtype=torch.float64).requires_grad_()) < 1e-12


def test_only_the_model_that_computes_has_the_kernel():
    module, other = make_norm(), make_norm()
    original = LlamaRMSNorm.forward
    with bound(module):
        assert "forward" in module.__dict__
        assert "forward" not in other.__dict__
        assert LlamaRMSNorm.forward is original
    assert "forward" not in module.__dict__


def test_forward_that_the_script_has_set_stays():
    module, calls = make_norm(), []
    kernels = FasterKernels(module, DEFAULT_OPTIONS)
    module.forward = calls.append
    with kernels.bound():
        assert module.forward == calls.append
    assert module.forward == calls.append


def test_kernel_is_unbound_after_an_error():
    module = make_norm()
    with pytest.raises(KeyboardInterrupt), bound(module):
        raise KeyboardInterrupt
    assert "forward" not in module.__dict__
