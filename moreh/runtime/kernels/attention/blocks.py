"""The blocks of causal attention: which queries meet which keys, and in which rows of memory they lie.

A row of a batch is one sequence, or several that are packed one after the other. Each sequence is cut into blocks of
`BLOCK_QUERIES` queries. A block sees the keys from the beginning of its sequence up to its own last query, so the
scores above the diagonal, which causal attention throws away, are computed within blocks only. Blocks with equal
numbers of queries and keys form a group, which is one batched matmul.

The row below packs sequence A = p0 p1 a2 a3 a4 and sequence B = p0 p1 b2 b3 b4, which share the prefix p0 p1. The
prefix is in the row once, at the beginning of A, and B sees it there: `cu_seqlens=(0, 5, 8)`, `prefix_len=2`. With
blocks of 4 queries:

    query   keys: p0 p1 a2 a3 a4 b2 b3 b4
    p0            x  .  .  .                 A, block 1: 4 queries, 4 keys
    p1            x  x  .  .
    a2            x  x  x  .
    a3            x  x  x  x
    a4            x  x  x  x  x              A, block 2: 1 query, 5 keys
    b2            x  x           x  .        B, block 1: 2 queries, 4 keys
    b3            x  x           x  x
    b4            x  x           x  x  x     B, block 2: 1 query, 5 keys

    x  a key that the query sees
    .  a score that is computed and masked; blank ones are never computed

The last blocks of A and of B form a group. B's blocks are counted from where its prefix would begin.

The operands of a matmul must be contiguous. One operation gathers the rows of all blocks, and another one puts the
results back into the order of the tokens, which is several times as fast as a copy for each block. This module computes
the indices of both: `block_*` for the way to the blocks, `token_*` for the way back.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

BLOCK_QUERIES = 128
"""Queries of a block: few enough that its scores fit a core's cache and that few masked scores are computed."""
QUERY_MULTIPLE = 32
"""A sequence's last block is padded to a multiple of this: in bfloat16 oneDNN compiles a kernel for each shape."""


@dataclass(frozen=True)
class PackedSequences:
    """The sequences of a row."""

    cu_seqlens: tuple[int, ...]
    """Their boundaries: 0, then the end of each sequence. The last one is the length of the row."""
    prefix_len: int = 0
    """Tokens that all sequences begin with. The row has them once, in the first sequence; the others lack them."""


class BlockShape(NamedTuple):
    """The shape of a group of blocks."""

    blocks: int
    """Blocks in the group."""
    queries: int
    """Queries of each block, padding included."""
    keys: int
    """Keys of each block, padding included."""


class _BlockRange(NamedTuple):
    """Positions in the row that define a block."""

    origin: int
    """The position at which the sequence would begin with its prefix: the block's keys are counted from here."""
    start: int
    """The first query."""
    stop: int
    """The position after the last query that is not padding."""


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of one shape. Their last query is at their last key, so all of them have the same causal mask."""

    query_positions: torch.Tensor
    """`[blocks, queries]`, positions in the row; those of padding may lie beyond its end."""
    key_positions: torch.Tensor
    """`[blocks, keys]`, likewise."""
    query_mask: torch.Tensor
    """`[blocks, queries]`, False for padding: another block computes this query, or there is none."""
    key_mask: torch.Tensor
    """`[blocks, keys]`, False for keys that only padding queries see."""


@dataclass(frozen=True)
class HeadLayout:
    """The memory layout of a tensor `[batch, heads, sequence, head_dim]`, seen as rows of `head_dim` elements."""

    batch: int
    """Size of the batch dimension."""
    heads: int
    """Size of the heads dimension."""
    row_strides: tuple[int, int, int]
    """The strides of batch, heads and sequence, in rows."""


@dataclass(frozen=True)
class SegmentSum:
    """Sums of rows: output row i sums the input rows `index[offsets[i]:offsets[i + 1]]`; zeros if there are none."""

    index: torch.Tensor
    """`[summands]`, the input rows of all sums, one sum after the other."""
    offsets: torch.Tensor
    """`[output rows]`, where the summands of each output row begin in `index`."""

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """`[input rows, size]` -> `[output rows, size]`."""
        # The public functional.embedding_bag would ask for a gradient of its weights.
        out: torch.Tensor = torch._embedding_bag_forward_only(rows, self.index, self.offsets, False, 0)[0]
        return out


def block_shapes(sequences: PackedSequences) -> list[BlockShape]:
    """The shape of each group of blocks, in the order of `block_groups`. Makes no tensors, so tracing may call it.

    >>> [tuple(shape) for shape in block_shapes(PackedSequences((0, 160, 200)))]
    [(1, 128, 128), (1, 32, 160), (1, 64, 64)]
    """
    return [BlockShape(len(ranges), *shape) for shape, ranges in _block_ranges(sequences).items()]


# The caches of this module are small, because all layers of a micro-batch have the same sequences.
@lru_cache(maxsize=4)
def block_groups(sequences: PackedSequences) -> list[BlockGroup]:
    """The blocks of all sequences of a row, grouped by their shapes."""
    groups = []
    for (queries, keys), ranges in _block_ranges(sequences).items():
        origin, start, stop = torch.tensor(ranges, device="cpu").T.unsqueeze(-1)
        query = start + torch.arange(queries, device="cpu")
        offset = torch.arange(keys, device="cpu")
        # The prefix of later sequences is that of the first one.
        key = torch.where(offset < sequences.prefix_len, offset, origin + offset)
        groups.append(BlockGroup(query, key, query < stop, key < stop))
    return groups


@lru_cache(maxsize=4)
def _block_ranges(sequences: PackedSequences) -> dict[tuple[int, int], list[_BlockRange]]:
    """The blocks by their numbers of queries and keys, padding included."""
    ranges: dict[tuple[int, int], list[_BlockRange]] = {}
    for sequence_start, sequence_stop in pairwise(sequences.cu_seqlens):
        origin = sequence_start - sequences.prefix_len if sequence_start > 0 else 0
        for block_start in range(origin, sequence_stop, BLOCK_QUERIES):
            start, stop = max(block_start, sequence_start), min(block_start + BLOCK_QUERIES, sequence_stop)
            if start < stop:  # else the block has tokens of the prefix only
                padded_stop = block_start + -(-(stop - block_start) // QUERY_MULTIPLE) * QUERY_MULTIPLE
                shape = padded_stop - start, padded_stop - origin
                ranges.setdefault(shape, []).append(_BlockRange(origin, start, stop))
    return ranges


@lru_cache(maxsize=2 * BLOCK_QUERIES // QUERY_MULTIPLE)
def causal_bias(queries: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask added to the scores of a block's queries and its last keys: -inf where the key is after the query."""
    return torch.full((queries, queries), float("-inf"), dtype=dtype, device="cpu").triu_(1)


def as_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, HeadLayout]:
    """A tensor `[batch, heads, sequence, head_dim]` as the rows `[n, head_dim]` of its memory.

    Copied only where its memory has no such rows.
    """
    batch, heads, length, head_dim = tensor.shape
    if tensor.stride(3) != 1 or any(stride % head_dim for stride in tensor.stride()[:3]):
        tensor = tensor.contiguous()
    batch_stride, head_stride, token_stride = (stride // head_dim for stride in tensor.stride()[:3])
    last = (batch - 1) * batch_stride + (heads - 1) * head_stride + (length - 1) * token_stride
    rows = tensor.as_strided((last + 1, head_dim), (head_dim, 1))
    return rows, HeadLayout(batch, heads, (batch_stride, head_stride, token_stride))


@lru_cache(maxsize=16)
def block_query_index(sequences: PackedSequences, layout: HeadLayout) -> torch.Tensor:
    """The row in memory of each query of the blocks, ordered `[blocks, batch, heads, queries]` within a group."""
    return torch.cat([_row_index(group.query_positions, sequences, layout) for group in block_groups(sequences)])


@lru_cache(maxsize=16)
def block_key_index(sequences: PackedSequences, layout: HeadLayout) -> torch.Tensor:
    """The row in memory of each key of the blocks, ordered `[blocks, batch, heads, keys]` within a group."""
    return torch.cat([_row_index(group.key_positions, sequences, layout) for group in block_groups(sequences)])


@lru_cache(maxsize=16)
def block_grad_sum(sequences: PackedSequences, layout: HeadLayout) -> SegmentSum:
    """Gathers the gradients of the blocks' outputs: rows in the order of `block_query_index`, zeros for padding."""
    is_query = _expand_to_heads([group.query_mask for group in block_groups(sequences)], layout)
    counts = is_query.long()
    return SegmentSum(block_query_index(sequences, layout)[is_query], counts.cumsum(0) - counts)


@lru_cache(maxsize=16)
def token_query_index(sequences: PackedSequences, batch: int, heads: int) -> torch.Tensor:
    """For each `[batch, sequence, heads]`, its row among the queries of the blocks. Padding is left out."""
    layout = _contiguous_layout(sequences, batch, heads)
    is_query = _expand_to_heads([group.query_mask for group in block_groups(sequences)], layout)
    index = torch.empty(batch * sequences.cu_seqlens[-1] * heads, dtype=torch.long, device="cpu")
    index[block_query_index(sequences, layout)[is_query]] = is_query.nonzero().squeeze(1)
    return index


@lru_cache(maxsize=16)
def token_key_sum(sequences: PackedSequences, batch: int, heads: int) -> SegmentSum:
    """For each `[batch, sequence, heads]`, the sum of its rows among the keys of the blocks: one for each block."""
    layout = _contiguous_layout(sequences, batch, heads)
    is_key = _expand_to_heads([group.key_mask for group in block_groups(sequences)], layout)
    tokens = block_key_index(sequences, layout)[is_key]
    counts = tokens.bincount(minlength=batch * sequences.cu_seqlens[-1] * heads)
    return SegmentSum(is_key.nonzero().squeeze(1)[tokens.argsort(stable=True)], counts.cumsum(0) - counts)


def _contiguous_layout(sequences: PackedSequences, batch: int, heads: int) -> HeadLayout:
    """The layout of a contiguous tensor `[batch, sequence, heads, head_dim]`."""
    return HeadLayout(batch, heads, (sequences.cu_seqlens[-1] * heads, 1, heads))


def _row_index(positions: torch.Tensor, sequences: PackedSequences, layout: HeadLayout) -> torch.Tensor:
    """The rows in memory of positions `[blocks, n]`: `[blocks * batch * heads * n]`."""
    batch_stride, head_stride, token_stride = layout.row_strides
    heads = torch.arange(layout.heads, device="cpu") * head_stride
    first_tokens = torch.arange(layout.batch, device="cpu").unsqueeze(1) * batch_stride + heads
    tokens = positions.clamp(max=sequences.cu_seqlens[-1] - 1) * token_stride
    return (first_tokens.unsqueeze(-1) + tokens[:, None, None]).flatten()


def _expand_to_heads(masks: list[torch.Tensor], layout: HeadLayout) -> torch.Tensor:
    """Masks `[blocks, n]` of all groups, repeated for batch and heads in the order of `_row_index`."""
    return torch.cat([mask[:, None, None].expand(-1, layout.batch, layout.heads, -1).flatten() for mask in masks])
