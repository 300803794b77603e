"""Causal attention on a processor, in blocks of queries: a few matrix products instead of torch's own kernel.

In bfloat16 torch 2.13's kernel for processors takes two to three times as long at the lengths of fine-tuning
(benchmarks/attention.py). Texts that follow each other in one packed row are told apart by `cu_seq_lens_q`, the name under
which transformers passes their beginnings to Flash Attention. Where `cu_seq_lens_k` counts more keys than a text has queries,
these are the first ones of the row, with which all texts begin.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from moreh.models.provenance import is_stock_transformers
from moreh.runtime.kernels.attention_blocks import (
    PackedSequences,
    as_rows,
    blocks_of,
    causal_bias,
    key_rows,
    key_scatter_index,
    num_scores,
    own_query_rows,
    query_gather_index,
    query_rows,
)

# Tokens of a text from which on blocks have too many probabilities at a time.
MAX_SEQUENCE_LENGTH = 1024
# The most probabilities of a layer that are kept for the backward pass. More are computed again there: a seventh product.
KEPT_BYTES = 2**23
_STARTS, _STARTS_OF_KEYS = "cu_seq_lens_q", "cu_seq_lens_k"
# What other attention functions of transformers compute besides.
_OTHER_ARGUMENTS = ("softcap", "position_bias", "cache", "s_aux")


@contextmanager
def use_block_attention() -> Iterator[None]:
    """Let the models of transformers that use torch's attention compute it in blocks where that is the same."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not is_stock_transformers(original):
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _block_attention_or(original)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, starts: tuple[int, ...], shared: int = 0
) -> torch.Tensor:
    """softmax(scale * query @ key^T) @ value over the keys up to each query: `[batch, sequence, heads, size]`.

    `query` is `[batch, heads, sequence, size]`; `key` and `value` may have fewer heads, each for as many neighbours of the
    query's. `starts` are the first positions of the texts in a row, 0 among them: a query sees those of its own text only,
    and the first `shared` of the row.
    """
    if torch.is_autocast_enabled(query.device.type):
        # As autocast does for torch's own attention; rotary embeddings leave float32.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        output: torch.Tensor = _attend(query, key, value, scale, list(starts), shared)[0]
    return output


@lru_cache(maxsize=2)
def _block_attention_or(original: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        # Without a mask the row is one text, whatever the caller of the model says: torch's own attention does not read it.
        starts = None if attention_mask is None else kwargs.get(_STARTS)
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        window = kwargs.get("sliding_window")
        longest = max(kwargs.get("max_length_q", 0), kwargs.get("max_length_k", 0)) or query.shape[2]
        same = (
            causal
            and longest <= MAX_SEQUENCE_LENGTH
            and dropout == 0.0
            and query.device.type == "cpu"
            and query.shape[2] == key.shape[2]
            and query.shape[2] > 1
            and (
                attention_mask is None if starts is None else query.shape[0] == 1 and int(starts[-1]) == query.shape[2]
            )
            and (window is None or window >= longest)
            and all(kwargs.get(name) is None for name in _OTHER_ARGUMENTS)
        )
        if not same:
            return original(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **kwargs,
            )
        firsts = (0,) if starts is None else tuple(starts[:-1].tolist())
        shared = (
            _shared_prefix_len(starts, kwargs.get(_STARTS_OF_KEYS)) if starts is not None and len(firsts) > 1 else 0
        )
        scale = scaling if scaling is not None else float(query.shape[-1] ** -0.5)
        return causal_attention(query, key, value, scale, firsts, shared), None

    return attention


def _shared_prefix_len(starts: torch.Tensor, starts_of_keys: torch.Tensor | None) -> int:
    """How many more keys than queries the texts after the first one have."""
    return 0 if starts_of_keys is None else int((starts_of_keys[2] - starts_of_keys[1]) - (starts[2] - starts[1]))


# An operation of its own, so that selective recomputation keeps what it gives and nothing of what happens within.
@torch.library.custom_op("moreh::causal_attention", mutates_args=())
def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, starts: Sequence[int], shared: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output `[batch, sequence, heads, size]`, and for the backward pass the queries of all blocks, scaled, `[queries,
    size]` and their probabilities in one tensor, which is empty where they are to be computed again.
    """
    batch, heads, length, _ = query.shape
    texts = PackedSequences(length, tuple(starts), shared)
    rows, lying = as_rows(query)
    all_queries = rows.index_select(0, query_rows(texts, lying)).mul_(scale)
    keys, values = _keys(key, texts), _keys(value, texts)
    folded, groups = batch * key.shape[1], heads // key.shape[1]
    pairs = batch * heads * num_scores(texts)
    probabilities = query.new_empty(pairs if pairs * query.element_size() <= KEPT_BYTES else 0)
    output = query.new_empty(all_queries.shape[0], value.shape[-1])
    parts = _blocks(texts, folded, groups, probabilities, [all_queries, output], [keys, values])
    for part, [of_query, of_output], [of_key, of_value] in parts:
        torch.bmm(_probabilities(of_query, of_key, groups, part), of_value, out=of_output)
    output = output.index_select(0, query_gather_index(texts, batch, heads)).view(batch, length, heads, -1)
    return output, all_queries, probabilities


def _probabilities(queries: torch.Tensor, keys: torch.Tensor, groups: int, out: torch.Tensor | None) -> torch.Tensor:
    """Those of blocks of one shape, given queries `[n, groups * queries, size]`, scaled, and keys `[n, keys, size]`."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    own = queries.shape[1] // groups
    scores.view(-1, groups, own, scores.shape[2])[..., -own:].add_(causal_bias(own, scores.dtype))
    return torch.softmax(scores, -1, out=out)


def _keys(key: torch.Tensor, texts: PackedSequences) -> torch.Tensor:
    """The keys or values of all blocks: `[keys, size]`."""
    rows, heads = as_rows(key)
    return rows.index_select(0, key_rows(texts, heads))


def _blocks(
    texts: PackedSequences,
    folded: int,
    groups: int,
    probabilities: torch.Tensor,
    of_queries: list[torch.Tensor],
    of_keys: list[torch.Tensor],
) -> Iterator[tuple[torch.Tensor | None, list[torch.Tensor], list[torch.Tensor]]]:
    """What blocks of one shape have of each tensor, for batch and key-value heads folded into one, one shape after the other.

    Probabilities are `[blocks * folded, groups * queries, keys]`, None if they are not kept, queries `[blocks * folded, groups
    * queries, size]` and keys `[blocks * folded, keys, size]`.
    """
    first = first_query = first_key = 0
    for blocks in blocks_of(texts):
        products = blocks.queries.shape[0] * folded
        queries, keys = groups * blocks.queries.shape[1], blocks.keys.shape[1]
        part = probabilities[first : first + products * queries * keys]
        yield (
            part.view(products, queries, keys) if len(probabilities) else None,
            [one[first_query : first_query + products * queries].view(products, queries, -1) for one in of_queries],
            [one[first_key : first_key + products * keys].view(products, keys, -1) for one in of_keys],
        )
        first += products * queries * keys
        first_query += products * queries
        first_key += products * keys


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    _, key, value, ctx.scale, ctx.starts, ctx.shared = inputs
    ctx.save_for_backward(key, value, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # Nothing arrives for them: no zeros of their size.
    ctx.set_materialize_grads(False)


def _attend_backward(
    ctx: Any, gradient: torch.Tensor | None, *_: None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None, None]:
    if gradient is None:
        return None, None, None, None, None, None
    key, value, queries, probabilities = ctx.saved_tensors
    batch, length, heads, _size = gradient.shape
    texts = PackedSequences(length, tuple(ctx.starts), ctx.shared)
    keys, values = _keys(key, texts), _keys(value, texts)
    rows, lying = as_rows(gradient.transpose(1, 2))
    arrived = own_query_rows(texts, lying).sums(rows)
    of_queries, of_keys, of_values = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    folded, groups = batch * key.shape[1], heads // key.shape[1]
    parts = _blocks(
        texts, folded, groups, probabilities, [queries, arrived, of_queries], [keys, values, of_keys, of_values]
    )
    for kept, [block_query, block_arrived, of_query], [block_key, block_value, of_key, of_value] in parts:
        part = _probabilities(block_query, block_key, groups, None) if kept is None else kept
        torch.bmm(part.transpose(1, 2), block_arrived, out=of_value)
        of_part = torch.bmm(block_arrived, block_value.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_part, part, -1, part.dtype)
        torch.bmm(of_scores, block_key, out=of_query)
        torch.bmm(of_scores.transpose(1, 2), block_query, out=of_key)
    of_queries = of_queries.mul_(ctx.scale).index_select(0, query_gather_index(texts, batch, heads))
    places = key_scatter_index(texts, batch, key.shape[1])
    return (
        of_queries.view(batch, length, heads, -1).transpose(1, 2),
        places.sums(of_keys).view(batch, length, key.shape[1], -1).transpose(1, 2),
        places.sums(of_values).view(batch, length, key.shape[1], -1).transpose(1, 2),
        None,
        None,
        None,
    )


_attend.register_autograd(_attend_backward, setup_context=_keep)
