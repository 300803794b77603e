"""The rotary embedding in few passes beside the one of transformers."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from moreh.runtime.kernels import rotary
from moreh.runtime.kernels.rotary import fused_rotary


def tensors(dtype):
    """Queries of 4 heads and keys of 2 as Llama's attention has them, and angles."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16)
    angles = torch.randn(2, 7, 16).to(torch.promote_types(dtype, torch.float32))
    return [tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in (query, key)], [angles.cos(), angles.sin()]


def results(given, angles):
    """What queries and keys are turned into, and their gradients."""
    turned = modeling_llama.apply_rotary_pos_emb(*given, *angles)
    torch.manual_seed(1)
    arriving = [torch.randn(tensor.shape).to(tensor.dtype) for tensor in turned]
    return *turned, *torch.autograd.grad(turned, given, arriving)


def worst(given, angles):
    """The largest difference between transformers' and ours."""
    expected = results(given, angles)
    with fused_rotary():
        seen = results(given, angles)
    assert [tensor.dtype for tensor in seen] == [tensor.dtype for tensor in expected]
    return max(float((a - b).detach().abs().max()) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_same_as_transformers(dtype, tolerance):
    """The two split_gate_up of the angles differ here, which those of Llama do not: a mistake between them would be seen."""
    assert worst(*tensors(dtype)) < tolerance


def test_comparison_finds_a_wrong_direction(monkeypatch):
    computed = rotary._turn
    monkeypatch.setattr(rotary, "_turn", lambda given, cos, sin: computed(given, cos, -sin))
    assert worst(*tensors(torch.float64)) > 0.1


def test_types_under_autocast():
    given, angles = tensors(torch.bfloat16)
    expected = modeling_llama.apply_rotary_pos_emb(*given, *angles)
    with torch.autocast("cpu", torch.bfloat16), fused_rotary():
        seen = results(given, angles)
    assert {tensor.dtype for tensor in seen} == {torch.bfloat16}
    for a, b in zip(seen, expected, strict=False):
        torch.testing.assert_close(a, b.bfloat16(), rtol=0.01, atol=0.01)


def test_transformers_own_is_back_afterwards():
    original = modeling_llama.apply_rotary_pos_emb
    with fused_rotary():
        assert modeling_llama.apply_rotary_pos_emb is not original
    assert modeling_llama.apply_rotary_pos_emb is original
