"""Causal attention on a processor, in blocks of queries: a few matrix products instead of torch's own kernel.

In bfloat16 torch 2.13's kernel for processors takes two to three times as long at the lengths of fine-tuning
(benchmarks/attention.py). Rows that follow each other in one packed row are told apart by `cu_seq_lens_q`, the name under
which transformers passes their beginnings to Flash Attention.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

# Queries of a block: its scores fit the cache of a core, and few keys behind a query are multiplied in vain.
BLOCK = 128
# Texts are filled up to multiples of this with what follows them: oneDNN compiles a kernel for each shape in bfloat16.
TEXT_MULTIPLE = 32
# Tokens of a text from which on the probabilities, which are kept for the backward pass, are too many: torch keeps none.
LONGEST_TEXT = 1024
_STARTS = "cu_seq_lens_q"
# What other attention functions of transformers compute besides.
_OTHER_ARGUMENTS = ("softcap", "position_bias", "cache", "s_aux")


@contextmanager
def attention_in_blocks() -> Iterator[None]:
    """Let the models of transformers that use torch's attention compute it in blocks where that is the same."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention_instead_of(original)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, starts: tuple[int, ...]
) -> torch.Tensor:
    """softmax(scale * query @ key^T) @ value over the keys up to each query: `[batch, sequence, heads, size]`.

    `query` is `[batch, heads, sequence, size]`; `key` and `value` may have fewer heads, each for as many neighbours of the
    query's. `starts` are the first positions of the texts in a row, 0 among them: a query sees those of its own text only.
    """
    if torch.is_autocast_enabled(query.device.type):
        # As autocast does for torch's own attention; rotary embeddings leave float32.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        output: torch.Tensor = _attend(query, key, value, scale, list(starts))[0]
    return output


@lru_cache(maxsize=2)
def _attention_instead_of(original: Callable[..., Any]) -> Callable[..., Any]:
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
        longest = kwargs.get("max_length_q", query.shape[2])
        same = (
            causal
            and longest <= LONGEST_TEXT
            and dropout == 0.0
            and query.device.type == "cpu"
            and query.shape[2] == key.shape[2]
            and query.shape[2] > 1
            and (attention_mask is None if starts is None else query.shape[0] == 1 and int(starts[-1]) == query.shape[2])
            and (window is None or window >= longest)
            and all(kwargs.get(name) is None for name in _OTHER_ARGUMENTS)
        )
        if not same:
            return original(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
            )
        firsts = (0,) if starts is None else tuple(starts[:-1].tolist())
        scale = scaling if scaling is not None else float(query.shape[-1] ** -0.5)
        return causal_attention(query, key, value, scale, firsts), None

    return attention


@dataclass(frozen=True)
class _Tiles:
    """Blocks of as many queries that see as many keys, which are multiplied together.

    `queries` and `keys` are where those of each block begin and end; `own` are the queries that the block is for, numbered
    within it: the others belong to other blocks. `mask` `[blocks, 1, 1, queries, keys]` is added to the scores: -inf for keys
    of other texts and behind the query.
    """

    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]
    own: tuple[tuple[int, int], ...]
    mask: torch.Tensor


# All layers of a micro-batch have the same.
@lru_cache(maxsize=4)
def _tiles(length: int, starts: tuple[int, ...], dtype: torch.dtype) -> list[_Tiles]:
    """The blocks that the queries of each text are cut into, those of one shape together.

    Two texts of 160 and 40 tokens are blocks of 128 queries x 128 keys, of 32 x 160 and of 64 x 64. A block that would reach
    over the end of the row begins earlier instead.
    """
    alike: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for start, stop in zip(starts, (*starts[1:], length), strict=True):
        for begin in range(start, stop, BLOCK):
            own_end = min(begin + BLOCK, stop)
            end = begin + -(-(own_end - begin) // TEXT_MULTIPLE) * TEXT_MULTIPLE
            over = max(0, end - length)
            first_query, first_key = max(0, begin - over), max(0, start - over)
            alike.setdefault((end - over - first_query, end - over - first_key), []).append(
                (begin, own_end, first_query, first_key)
            )
    tiles = []
    for (queries, keys), blocks in alike.items():
        mask = torch.zeros(len(blocks), 1, 1, queries, keys, dtype=dtype)
        for block, (begin, own_end, first_query, first_key) in zip(mask, blocks, strict=True):
            start = starts[bisect_right(starts, begin) - 1]
            own = block[0, 0, begin - first_query : own_end - first_query]
            own[:, : start - first_key] = float("-inf")
            behind = torch.arange(keys) + first_key > torch.arange(begin, own_end).unsqueeze(1)
            own.masked_fill_(behind, float("-inf"))
        tiles.append(
            _Tiles(
                tuple((first_query, first_query + queries) for _, _, first_query, _ in blocks),
                tuple((first_key, first_key + keys) for _, _, _, first_key in blocks),
                tuple((begin - first_query, own_end - first_query) for begin, own_end, first_query, _ in blocks),
                mask,
            )
        )
    return tiles


# An operation of its own, so that selective recomputation keeps what it gives and nothing of what happens within.
@torch.library.custom_op("moreh::causal_attention", mutates_args=())
def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, starts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output `[batch, sequence, heads, size]`, and for the backward pass the probabilities of all blocks in one tensor."""
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    output = query.new_empty(batch, length, heads, value.shape[-1])
    tiles = _tiles(length, tuple(starts), query.dtype)
    probabilities = query.new_empty(sum(batch * heads * tile.mask.numel() for tile in tiles))
    for tile, part in zip(tiles, _parts(probabilities, tiles, batch * key.shape[1], groups), strict=True):
        rows = _cut(query, tile.queries, groups).mul_(scale)
        scores = torch.bmm(rows, _cut(key, tile.keys).transpose(1, 2))
        scores.view(len(tile.keys), -1, groups, *tile.mask.shape[-2:]).add_(tile.mask)
        torch.softmax(scores, -1, out=part)
        _put(torch.bmm(part, _cut(value, tile.keys)), output.transpose(1, 2), tile)
    return output, probabilities


def _parts(probabilities: torch.Tensor, tiles: list[_Tiles], folded: int, groups: int) -> list[torch.Tensor]:
    """The probabilities of each of the tiles, `[blocks * batch * key-value heads, groups * queries, keys]`."""
    parts = probabilities.split([folded * groups * tile.mask.numel() for tile in tiles])
    return [
        part.view(len(tile.keys) * folded, groups * tile.mask.shape[-2], -1) for tile, part in zip(tiles, parts, strict=True)
    ]


def _cut(tensor: torch.Tensor, ranges: tuple[tuple[int, int], ...], groups: int = 1) -> torch.Tensor:
    """Some ranges of `[batch, heads, sequence, size]`: `[ranges * batch * heads / groups, groups * range, size]`.

    Contiguous, which torch would make each operand of a product by itself.
    """
    cut = torch.stack([tensor[:, :, begin:end] for begin, end in ranges])
    return cut.view(-1, groups * cut.shape[-2], cut.shape[-1])


def _put(cut: torch.Tensor, tensor: torch.Tensor, tile: _Tiles) -> None:
    """What belongs to the queries that the blocks are for into their places in `[batch, heads, sequence, size]`."""
    blocks = cut.view(len(tile.queries), *tensor.shape[:2], -1, cut.shape[-1])
    for block, (first, _), (begin, end) in zip(blocks, tile.queries, tile.own, strict=True):
        tensor[:, :, first + begin : first + end] = block[:, :, begin:end]


def _cut_own(tensor: torch.Tensor, tile: _Tiles, groups: int) -> torch.Tensor:
    """As `_cut`, with zeros for the queries that the blocks are not for."""
    cut = _cut(tensor, tile.queries, groups)
    blocks = cut.view(len(tile.queries), *tensor.shape[:2], -1, cut.shape[-1])
    for block, (begin, end) in zip(blocks, tile.own, strict=True):
        if begin > 0:
            block[:, :, :begin] = 0
        if end < block.shape[2]:
            block[:, :, end:] = 0
    return cut


def _add(cut: torch.Tensor, tensor: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> None:
    """The opposite of `_cut`: added up, since ranges overlap."""
    blocks = cut.view(len(ranges), *tensor.shape[:2], -1, cut.shape[-1])
    for block, (begin, end) in zip(blocks, ranges, strict=True):
        tensor[:, :, begin:end] += block


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, ctx.scale, ctx.starts = inputs
    ctx.save_for_backward(query, key, value, output[1])
    ctx.mark_non_differentiable(output[1])


def _attend_backward(
    ctx: Any, gradient: torch.Tensor, _: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
    query, key, value, probabilities = ctx.saved_tensors
    batch, heads, length, _size = query.shape
    groups = heads // key.shape[1]
    of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    tiles = _tiles(length, tuple(ctx.starts), query.dtype)
    for tile, part in zip(tiles, _parts(probabilities, tiles, batch * key.shape[1], groups), strict=True):
        arrived = _cut_own(gradient.transpose(1, 2), tile, groups)
        _add(torch.bmm(part.transpose(1, 2), arrived), of_value, tile.keys)
        of_part = torch.bmm(arrived, _cut(value, tile.keys).transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_part, part, -1, part.dtype)
        _put(torch.bmm(of_scores, _cut(key, tile.keys)).mul_(ctx.scale), of_query, tile)
        rows = _cut(query, tile.queries, groups).mul_(ctx.scale)
        _add(torch.bmm(of_scores.transpose(1, 2), rows), of_key, tile.keys)
    return of_query, of_key, of_value, None, None


_attend.register_autograd(_attend_backward, setup_context=_keep)
