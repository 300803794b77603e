"""The RMSNorm in few passes beside the one of transformers."""

from unittest import mock

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.kernels import rms_norm as normalization
from moreh.runtime.kernels import row_chunks as chunks
from moreh.runtime.kernels.faster_kernels import FasterKernels
from moreh.runtime.kernels.rms_norm import rms_norm
from tests.helpers import compare
from tests.helpers.float64 import exact_float64

SIZE = 24


def norm(dtype=torch.float64):
    torch.manual_seed(0)
    module = LlamaRMSNorm(SIZE, eps=1e-3).to(dtype)
    torch.nn.init.normal_(module.weight)
    return module


def results(module, given):
    """The output, and the gradients of the input and of the weight."""
    output = module(given)
    torch.manual_seed(1)
    arriving = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    return output, *torch.autograd.grad(output, (given, module.weight), arriving)


def fused(module):
    """Within it the module computes with our kernel."""
    return FasterKernels(module, DEFAULT_OPTIONS).bound()


def worst(module, given):
    """The largest difference between transformers' and ours."""
    with exact_float64():
        expected = results(module, given)
        with fused(module):
            seen = results(module, given)
    return compare.worst(compare.max_difference(a, b) for a, b in zip(seen, expected, strict=True))


# 7 rows in chunks of 1, of 3, and together.
@pytest.mark.parametrize("chunk", [1, 3 * SIZE, chunks.CHUNK])
def test_same_as_transformers(monkeypatch, chunk):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    # Not contiguous, as what is sliced from a longer sequence.
    given = torch.randn(1, 9, SIZE, dtype=torch.float64)[:, 1:8].requires_grad_()
    assert worst(norm(), given) < 1e-12


def test_comparison_finds_another_mean():
    computed = rms_norm

    def without_epsilon(given, weight, epsilon, dtype):
        return computed(given, weight, 0.0, dtype)

    with mock.patch.object(normalization, "rms_norm", without_epsilon):
        assert worst(norm(), torch.randn(1, 7, SIZE, dtype=torch.float64).requires_grad_()) > 1e-4


def test_types_under_autocast():
    """The residual stream stays in float32, what linear layers read is in bfloat16 at once."""
    module, given = norm(torch.float32), torch.randn(2, 7, SIZE).requires_grad_()
    exact = results(module, given)
    with torch.autocast("cpu", torch.bfloat16), fused(module):
        seen = results(module, given)
    assert [tensor.dtype for tensor in seen] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(seen, exact, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.05)


def test_backward_pass_under_autocast_computes_in_float32():
    module, given = norm(torch.float32), torch.randn(2, 7, SIZE).requires_grad_()
    output = rms_norm(given, module.weight, 1e-3, torch.float32)
    arriving = torch.randn(2, 7, SIZE)
    expected = torch.autograd.grad(output, (given, module.weight), arriving, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        seen = torch.autograd.grad(output, (given, module.weight), arriving)
    for a, b in zip(seen, expected, strict=True):
        assert torch.equal(a, b)


def kept_beside_linear_layer(module):
    """The elements that the norm and the linear layer behind it keep for the backward pass, one storage counted once."""
    given, linear = torch.randn(2, 7, SIZE).requires_grad_(), torch.nn.Linear(SIZE, 5)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with fused(module), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(module(given * 1))
    return sum(tensor.numel() for tensor in kept.values())


@pytest.mark.parametrize(("smallest", "activations"), [(0.1, 1), (0.0, 2)])
def test_keeps_what_the_linear_layer_keeps(smallest, activations):
    """Unless its input cannot be computed from that."""
    module = norm(torch.float32)
    with torch.no_grad():
        module.weight.clamp_(min=0.1)[0] = smallest
    weights = SIZE + 5 * SIZE
    assert kept_beside_linear_layer(module) == activations * 2 * 7 * SIZE + 2 * 7 + weights


def test_weight_of_zero():
    module = norm()
    with torch.no_grad():
        module.weight[3] = 0
    assert worst(module, torch.randn(1, 7, SIZE, dtype=torch.float64).requires_grad_()) < 1e-12


def test_only_the_model_that_computes_has_the_kernel():
    module, other = norm(), norm()
    original = LlamaRMSNorm.forward
    with fused(module):
        assert "forward" in module.__dict__
        assert "forward" not in other.__dict__
        assert LlamaRMSNorm.forward is original
    assert "forward" not in module.__dict__


def test_forward_of_the_script_stays():
    module, doubled = norm(), []
    kernels = FasterKernels(module, DEFAULT_OPTIONS)
    module.forward = doubled.append
    with kernels.bound():
        assert module.forward == doubled.append
    assert module.forward == doubled.append


def test_kernel_is_unbound_after_an_error():
    module = norm()
    with pytest.raises(KeyboardInterrupt), fused(module):
        raise KeyboardInterrupt
    assert "forward" not in module.__dict__
