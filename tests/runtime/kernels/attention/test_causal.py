"""Attention in blocks beside torch's attention with a mask of all pairs of tokens."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from moreh.runtime.kernels.attention import causal
from moreh.runtime.kernels.attention.blocks import SegmentSum
from moreh.runtime.kernels.attention.causal import causal_attention
from tests.helpers import compare

# Batch, heads, key-value heads, and the boundaries of the sequences in a row.
CASES = [
    (2, 4, 2, (0, 300)),
    (3, 2, 2, (0, 20)),
    (1, 4, 4, (0, 17, 100, 290, 300)),
    (1, 6, 2, (0, 129, 130, 400, 512)),
]
# And the tokens that later sequences share with the first one.
PREFIX_CASES = [
    (1, 4, 2, (0, 17, 100, 290, 300), 7),
    (1, 6, 2, (0, 129, 130, 400, 512), 128),
    (1, 2, 2, (0, 300, 301, 460, 700), 270),
    (2, 2, 1, (0, 40, 50, 90), 32),
]
PACKED = CASES[2]
SCALE = 0.3


def make_inputs(batch, heads, kv_heads, length, dtype=torch.float64):
    """Query, key and value."""
    torch.manual_seed(0)
    shapes = [(batch, length, heads, 16), (batch, length, kv_heads, 16), (batch, length, kv_heads, 16)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def masked_attention(query, key, value, scale, cu_seqlens, prefix_len=0):
    """With a mask of all pairs of tokens."""
    length, group_size = query.shape[2], query.shape[1] // key.shape[1]
    sequence = sum((torch.arange(length) >= start).int() for start in cu_seqlens[:-1])
    visible = (sequence[:, None] == sequence[None]) | (torch.arange(length) < prefix_len)
    mask = visible & torch.ones(length, length, dtype=torch.bool).tril()
    key, value = key.repeat_interleave(group_size, 1), value.repeat_interleave(group_size, 1)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


def worst_difference(inputs, cu_seqlens, compute=causal_attention, prefix_len=0):
    """Of the output and of the gradients, from attention with a mask."""
    actual = compute(*inputs, SCALE, cu_seqlens, prefix_len)
    expected = masked_attention(*inputs, SCALE, cu_seqlens, prefix_len)
    grad_output = torch.randn_like(expected)
    grads = torch.autograd.grad(actual, inputs, grad_output)
    expected_grads = torch.autograd.grad(expected, inputs, grad_output)
    pairs = zip((actual, *grads), (expected, *expected_grads), strict=True)
    return compare.worst(compare.max_difference(a, b) for a, b in pairs)


@pytest.mark.parametrize("max_saved_bytes", [causal.MAX_SAVED_BYTES, 0])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "cu_seqlens"), CASES)
def test_equals_attention_with_a_mask(monkeypatch, batch, heads, kv_heads, cu_seqlens, max_saved_bytes):
    monkeypatch.setattr(causal, "MAX_SAVED_BYTES", max_saved_bytes)
    assert worst_difference(make_inputs(batch, heads, kv_heads, cu_seqlens[-1]), cu_seqlens) < 1e-12


@pytest.mark.parametrize("max_saved_bytes", [causal.MAX_SAVED_BYTES, 0])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "cu_seqlens", "prefix_len"), PREFIX_CASES)
def test_equals_attention_with_a_mask_when_sequences_share_a_prefix(
    monkeypatch, batch, heads, kv_heads, cu_seqlens, prefix_len, max_saved_bytes
):
    monkeypatch.setattr(causal, "MAX_SAVED_BYTES", max_saved_bytes)
    inputs = make_inputs(batch, heads, kv_heads, cu_seqlens[-1])
    assert worst_difference(inputs, cu_seqlens, prefix_len=prefix_len) < 1e-12

    def shorter_prefix(*args):
        return causal_attention(*args[:-1], prefix_len - 1)

    assert worst_difference(inputs, cu_seqlens, shorter_prefix, prefix_len) > 1e-3


def test_row_without_boundaries_is_one_sequence():
    inputs = make_inputs(2, 4, 2, 130)
    assert torch.equal(causal_attention(*inputs, SCALE), causal_attention(*inputs, SCALE, (0, 130)))


@pytest.mark.parametrize(("max_saved_bytes", "saved_scores"), [(causal.MAX_SAVED_BYTES, 128**2), (0, 0)])
def test_saves_queries_keys_values_and_probabilities_up_to_a_size(monkeypatch, max_saved_bytes, saved_scores):
    monkeypatch.setattr(causal, "MAX_SAVED_BYTES", max_saved_bytes)
    inputs, saved = make_inputs(1, 1, 1, 128), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        causal_attention(*inputs, SCALE)
    assert sum(saved) == 3 * 128 * 16 + saved_scores


def without_mask_in_backward(monkeypatch, inputs):
    """The output of a forward pass whose backward pass recomputes probabilities without the causal mask."""
    monkeypatch.setattr(causal, "MAX_SAVED_BYTES", 0)
    output = causal_attention(*inputs, SCALE)
    monkeypatch.setattr(causal, "causal_bias", lambda queries, dtype: torch.zeros(queries, queries, dtype=dtype))
    return output


def test_comparison_finds_wrong_probabilities_in_the_backward_pass(monkeypatch):
    inputs = make_inputs(*CASES[0][:3], 300)
    assert worst_difference(inputs, (0, 300), lambda *args: without_mask_in_backward(monkeypatch, inputs)) > 1e-3


def boundaries_one_late(query, key, value, scale, cu_seqlens, prefix_len):
    inner = (boundary + 1 for boundary in cu_seqlens[1:-1])
    return causal_attention(query, key, value, scale, (0, *inner, cu_seqlens[-1]))


def nan_in_the_output(*args):
    output = causal_attention(*args)
    # Not the first element, and with a gradient.
    return output + torch.zeros_like(output).index_fill_(1, torch.tensor(5), float("nan"))


def nan_in_a_gradient(query, key, value, *args):
    value = value.clone()
    value.register_hook(lambda grad: grad.index_fill(2, torch.tensor(5), float("nan")))
    return causal_attention(query, key, value, *args)


@pytest.mark.parametrize("compute", [boundaries_one_late, nan_in_the_output, nan_in_a_gradient])
def test_comparison_finds_wrong_boundaries_and_nans(compute):
    assert worst_difference(make_inputs(*PACKED[:3], 300), PACKED[3], compute) > 1e-3


def test_comparison_finds_gradients_of_padding_queries(monkeypatch):
    def with_padding(sequences, layout):
        index = causal.block_query_index(sequences, layout)
        return SegmentSum(index, torch.arange(len(index)))

    monkeypatch.setattr(causal, "block_grad_sum", with_padding)
    assert worst_difference(make_inputs(*PACKED[:3], 300), PACKED[3]) > 1e-3


@pytest.mark.parametrize("width", [3 * 16, 20])
def test_heads_may_be_slices_of_a_wider_tensor(width):
    """As slices of one projection for queries, keys and values; and where no stride is a multiple of the head size."""
    torch.manual_seed(0)
    inputs = [
        torch.randn(2, 40, 3, width, dtype=torch.float64)[..., 2:18].transpose(1, 2).requires_grad_() for _ in range(3)
    ]
    assert worst_difference(inputs, (0, 40)) < 1e-12


def test_saved_tensors_may_be_unpacked_to_another_place():
    """Hooks on saved tensors may return a part of a larger tensor."""

    def moved(tensor):
        return torch.cat([tensor.new_ones(7), tensor.flatten()])[7:].view(tensor.shape)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, moved):
        assert worst_difference(make_inputs(*PACKED[:3], 300), PACKED[3]) < 1e-12


def test_training_after_inference_mode():
    """The indices that are cached in inference mode serve afterwards."""
    cu_seqlens = (0, 23, 119)  # used by no other test
    inputs = make_inputs(1, 2, 2, 119)
    with torch.inference_mode():
        causal_attention(*inputs, SCALE, cu_seqlens)
    assert worst_difference(inputs, cu_seqlens) < 1e-12


def test_bfloat16_is_as_exact_as_torch():
    """Beside the same inputs in float64: no farther off than twice what torch's own kernel is."""
    inputs = make_inputs(2, 4, 4, 300, torch.bfloat16)
    exact = masked_attention(*(tensor.double() for tensor in inputs), 0.25, (0, 300))
    error = (causal_attention(*inputs, 0.25).double() - exact).abs().mean()
    torch_output = functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.25).transpose(1, 2)
    assert error < 2 * (torch_output.double() - exact).abs().mean()


@pytest.mark.parametrize("dtypes", [[torch.float32] * 3, [torch.float32, torch.float32, torch.bfloat16]])
def test_autocast_computes_in_bfloat16(dtypes):
    """Rotary embeddings leave queries and keys in float32."""
    inputs = [
        tensor.detach().to(dtype).requires_grad_()
        for tensor, dtype in zip(make_inputs(2, 4, 4, 20), dtypes, strict=True)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        actual = causal_attention(*inputs, 0.25)
        expected = functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.25).transpose(1, 2)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    grads = torch.autograd.grad(actual.float().square().sum(), inputs)
    assert [grad.dtype for grad in grads] == dtypes


def test_backward_under_autocast_computes_in_the_dtype_of_forward():
    inputs = make_inputs(2, 4, 2, 40, torch.float32)
    loss = causal_attention(*inputs, SCALE).square().sum()
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("max_saved_bytes", [causal.MAX_SAVED_BYTES, 0])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "cu_seqlens", "prefix_len"),
    [(*CASES[0], 0), (*CASES[1], 0), (*PACKED, 0), PREFIX_CASES[0], PREFIX_CASES[3]],
)
def test_operators_pass_opcheck(monkeypatch, batch, heads, kv_heads, cu_seqlens, prefix_len, max_saved_bytes):
    """Schema, aliasing, autograd registration, fake implementation, and tracing with dynamic shapes."""
    monkeypatch.setattr(causal, "MAX_SAVED_BYTES", max_saved_bytes)
    inputs = make_inputs(batch, heads, kv_heads, cu_seqlens[-1], torch.float32)
    arguments = SCALE, list(cu_seqlens), prefix_len
    torch.library.opcheck(torch.ops.moreh.causal_attention.default, (*inputs, *arguments))
    query, key, value = (tensor.detach() for tensor in inputs)
    output, queries, probabilities = torch.ops.moreh.causal_attention(query, key, value, *arguments)
    saved = key, value, queries, probabilities
    torch.library.opcheck(
        torch.ops.moreh.causal_attention_backward.default, (torch.randn_like(output), *saved, *arguments)
    )


def test_tracing_with_fake_tensors_leaves_no_fake_index_in_the_caches():
    cu_seqlens = (0, 37, 121)  # used by no other test
    with FakeTensorMode():
        inputs = make_inputs(1, 2, 1, 121, torch.float32)
        grads = torch.autograd.grad(causal_attention(*inputs, SCALE, cu_seqlens).sum(), inputs)
        assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs]
    assert worst_difference(make_inputs(1, 2, 1, 121), cu_seqlens) < 1e-12


def test_meta_tensors_have_the_shapes_of_the_results():
    inputs = [torch.empty(2, heads, 300, 16, device="meta", requires_grad=True) for heads in (4, 2, 2)]
    output = causal_attention(*inputs, SCALE)
    assert (output.shape, output.device.type) == ((2, 300, 4, 16), "meta")
    assert [grad.shape for grad in torch.autograd.grad(output.sum(), inputs)] == [tensor.shape for tensor in inputs]


def test_compiled_in_one_graph_for_several_lengths():
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (40, 200):
        assert worst_difference(make_inputs(2, 4, 2, length), (0, length), compiled) < 1e-12


def test_second_derivative_is_refused():
    inputs = make_inputs(1, 2, 2, 20)
    grads = torch.autograd.grad(causal_attention(*inputs, SCALE).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_attention_backward"):
        grads[0].sum().backward()
