"""Attention in blocks beside torch's own."""

import pytest
import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moreh.runtime.kernels import attention
from moreh.runtime.kernels.attention import causal_attention, use_block_attention
from moreh.runtime.kernels.attention_blocks import SegmentSum

CASES = [
    (2, 4, 2, 300, (0,)),
    (3, 2, 2, 20, (0,)),
    (1, 4, 4, 300, (0, 17, 100, 290)),
    (1, 6, 2, 512, (0, 129, 130, 400)),
]
# The tokens that later texts share with the first one.
SHARED_CASES = [
    (1, 4, 2, 300, (0, 17, 100, 290), 7),
    (1, 6, 2, 512, (0, 129, 130, 400), 128),
    (1, 2, 2, 700, (0, 300, 301, 460), 270),
    (2, 2, 1, 90, (0, 40, 50), 32),
]


def tensors(batch, heads, kv_heads, length, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(batch, length, heads, 16), (batch, length, kv_heads, 16), (batch, length, kv_heads, 16)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def whole_attention(query, key, value, scale, starts, shared=0):
    """With a mask of all pairs of tokens."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    text = sum((torch.arange(length) >= start).int() for start in starts)
    seen = (text[:, None] == text[None]) | (torch.arange(length) < shared)
    mask = seen & torch.ones(length, length, dtype=torch.bool).tril()
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


def worst(given, scale, starts, compute=causal_attention, shared=0):
    """The largest difference of the output and of the gradients."""
    seen, expected = compute(*given, scale, starts, shared), whole_attention(*given, scale, starts, shared)
    arriving = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(seen, given, arriving), torch.autograd.grad(expected, given, arriving), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in [(seen, expected), *pairs])


@pytest.mark.parametrize("kept_bytes", [attention.KEPT_BYTES, 0])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "length", "starts"), CASES)
def test_same_as_with_a_mask(monkeypatch, batch, heads, kv_heads, length, starts, kept_bytes):
    monkeypatch.setattr(attention, "KEPT_BYTES", kept_bytes)
    assert worst(tensors(batch, heads, kv_heads, length), 0.3, starts) < 1e-12


@pytest.mark.parametrize("kept_bytes", [attention.KEPT_BYTES, 0])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "length", "starts", "shared"), SHARED_CASES)
def test_texts_that_begin_alike(monkeypatch, batch, heads, kv_heads, length, starts, shared, kept_bytes):
    monkeypatch.setattr(attention, "KEPT_BYTES", kept_bytes)
    given = tensors(batch, heads, kv_heads, length)
    assert worst(given, 0.3, starts, shared=shared) < 1e-12
    assert worst(given, 0.3, starts, lambda *arguments: causal_attention(*arguments[:-1], shared - 1), shared) > 1e-3


@pytest.mark.parametrize(("kept_bytes", "elements_kept"), [(attention.KEPT_BYTES, 128**2), (0, 0)])
def test_what_is_kept(monkeypatch, kept_bytes, elements_kept):
    """Queries, keys and values, and one block of probabilities if they are."""
    monkeypatch.setattr(attention, "KEPT_BYTES", kept_bytes)
    given, kept = tensors(1, 1, 1, 128), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        causal_attention(*given, 0.3, (0,))
    assert sum(kept) == 3 * 128 * 16 + elements_kept


def test_comparison_finds_wrong_probabilities_in_the_backward_pass(monkeypatch):
    monkeypatch.setattr(attention, "KEPT_BYTES", 0)
    given = tensors(*CASES[0][:4])
    output, expected = causal_attention(*given, 0.3, (0,)), whole_attention(*given, 0.3, (0,))
    monkeypatch.setattr(attention, "causal_bias", lambda queries, dtype: torch.zeros(queries, queries, dtype=dtype))
    seen, wanted = (torch.autograd.grad(one.square().sum(), given) for one in (output, expected))
    assert max(float((a - b).abs().max()) for a, b in zip(seen, wanted, strict=True)) > 1e-3


@pytest.mark.parametrize("width", [3 * 16, 20])
def test_heads_in_a_wider_tensor(width):
    """As slices of one projection for queries, keys and values; and where no step in memory is whole heads."""
    torch.manual_seed(0)
    given = [
        torch.randn(2, 40, 3, width, dtype=torch.float64)[..., 2:18].transpose(1, 2).requires_grad_() for _ in range(3)
    ]
    assert worst(given, 0.3, (0,)) < 1e-12


def test_what_is_kept_may_come_back_elsewhere():
    """Hooks on saved tensors may give a part of a larger tensor back."""

    def moved(tensor):
        return torch.cat([tensor.new_ones(7), tensor.flatten()])[7:].view(tensor.shape)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, moved):
        assert worst(tensors(*CASES[2][:4]), 0.3, CASES[2][4]) < 1e-12


def test_comparison_finds_a_wrong_beginning():
    def one_late(query, key, value, scale, starts, shared):
        return causal_attention(query, key, value, scale, (0, *(start + 1 for start in starts[1:])))

    assert worst(tensors(*CASES[2][:4]), 0.3, CASES[2][4], one_late) > 1e-3


def test_comparison_finds_gradients_of_queries_of_other_blocks(monkeypatch):
    def all_queries(texts, heads):
        rows = attention.query_rows(texts, heads)
        return SegmentSum(rows, torch.arange(len(rows)))

    monkeypatch.setattr(attention, "own_query_rows", all_queries)
    assert worst(tensors(*CASES[2][:4]), 0.3, CASES[2][4]) > 1e-3


def test_bfloat16_is_as_exact_as_torch():
    """Beside the same inputs in float64: no farther off than twice what torch's own kernel is."""
    given = tensors(2, 4, 4, 300, torch.bfloat16)
    exact = whole_attention(*(tensor.double() for tensor in given), 0.25, (0,))
    own = (causal_attention(*given, 0.25, (0,)).double() - exact).abs().mean()
    torch_own = functional.scaled_dot_product_attention(*given, is_causal=True, scale=0.25).transpose(1, 2)
    assert own < 2 * (torch_own.double() - exact).abs().mean()


@pytest.mark.parametrize("dtypes", [[torch.float32] * 3, [torch.float32, torch.float32, torch.bfloat16]])
def test_autocast_computes_in_bfloat16(dtypes):
    """Rotary embeddings leave queries and keys in float32."""
    given = [
        tensor.detach().to(dtype).requires_grad_() for tensor, dtype in zip(tensors(2, 4, 4, 20), dtypes, strict=True)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        seen = causal_attention(*given, 0.25, (0,))
        expected = functional.scaled_dot_product_attention(*given, is_causal=True, scale=0.25).transpose(1, 2)
    assert seen.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(seen, expected, rtol=0.02, atol=0.02)
    gradients = torch.autograd.grad(seen.float().square().sum(), given)
    assert [gradient.dtype for gradient in gradients] == dtypes


def call(**changes):
    query, key, value = tensors(2, 4, 2, 20)
    arguments = {"attention_mask": None, "dropout": 0.0, "scaling": None, "is_causal": True} | changes
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, **arguments)[0]


@pytest.mark.parametrize(
    ("changes", "in_blocks"),
    [
        ({}, True),
        ({"sliding_window": 20}, True),
        ({"sliding_window": 19}, False),
        ({"attention_mask": torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()}, False),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 20])}, True),
        ({"dropout": 0.5}, False),
        ({"max_length_q": attention.MAX_SEQUENCE_LENGTH + 1}, False),
        ({"is_causal": False}, False),
        ({"position_bias": torch.zeros(2, 4, 20, 20, dtype=torch.float64)}, False),
    ],
)
def test_computed_in_blocks_only_where_it_is_the_same(monkeypatch, changes, in_blocks):
    seen = []
    monkeypatch.setattr(attention, "causal_attention", lambda *given: seen.append(given) or causal_attention(*given))
    torch.manual_seed(1)
    expected = call(**changes)
    with use_block_attention():
        torch.manual_seed(1)
        torch.testing.assert_close(call(**changes), expected, rtol=1e-9, atol=1e-9)
    assert len(seen) == in_blocks
    call(**changes)
    assert len(seen) == in_blocks, "torch's own is back afterwards"
