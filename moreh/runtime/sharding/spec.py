"""The spec of a sharded parameter, and the boxes of the full tensor on each rank.

Every rank computes the boxes of all ranks without communication. Loading, saving and resuming therefore read, write and
move tensors box by box, from any plan to any other.
"""

from dataclasses import dataclass
from itertools import product

import torch

# A range of each dimension of a full tensor: start and stop, [dimensions, 2].
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TPSplit:
    """The split of a parameter over tensor-parallel ranks."""

    dim: int
    """The dimension that is split."""
    chunk_sizes: tuple[int, ...]
    """The lengths of consecutive chunks along `dim`. Each chunk is split separately: rank r has the r-th part of every
    chunk, concatenated. A plain matrix is one chunk. GPT-2's c_attn has three: the columns of query, key and value."""


@dataclass(frozen=True)
class ParamSpec:
    """The ranks that hold a parameter, and its split over them."""

    name: str
    """The parameter's name in `named_parameters()`; of tied parameters, the first."""
    shape: tuple[int, ...]
    """The shape of the full tensor."""
    dtype: torch.dtype
    """The dtype of the local tensors."""
    pipeline_ranks: tuple[int, ...]
    """The pipeline ranks that hold it: one, or several if it is tied between stages."""
    tp_split: TPSplit | None = None
    """The split over the tensor-parallel ranks of a pipeline rank. None: each holds the whole parameter."""
    fsdp_dim: int | None = None
    """The dimension along which data-parallel ranks shard a tensor-parallel rank's part. None: each holds all of it."""


def shard_range(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """The range of `length` elements that a rank gets. As in torch.chunk and DTensor, the last ranks may get fewer.

    >>> [shard_range(10, 4, rank) for rank in range(4)]
    [(0, 3), (3, 6), (6, 9), (9, 10)]
    """
    size = -(-length // ranks)
    start = min(rank * size, length)
    return start, min(start + size, length)


def tp_shard_shape(spec: ParamSpec, tp_rank: int, tp_size: int) -> tuple[int, ...]:
    """The shape of a tensor-parallel rank's part of a parameter, before FSDP shards it."""
    if spec.tp_split is None:
        return spec.shape
    ranges = (shard_range(size, tp_size, tp_rank) for size in spec.tp_split.chunk_sizes)
    length = sum(stop - start for start, stop in ranges)
    return tuple(length if dim == spec.tp_split.dim else size for dim, size in enumerate(spec.shape))


def shard_boxes(spec: ParamSpec, tp_rank: int, tp_size: int, dp_rank: int, dp_size: int) -> list[Box]:
    """The boxes of the full tensor that a rank holds. Concatenated along the split dimension they are its local tensor.

    A tensor that is not split in chunks has one box. Empty boxes are left out.
    """
    # The ranges of each dimension. Only the split dimension can have several.
    ranges = [[(0, length)] for length in spec.shape]
    if spec.tp_split is not None:
        ranges[spec.tp_split.dim] = _chunk_ranges(spec.tp_split.chunk_sizes, tp_rank, tp_size)
    if spec.fsdp_dim is not None:
        length = sum(stop - start for start, stop in ranges[spec.fsdp_dim])
        ranges[spec.fsdp_dim] = _slice_ranges(ranges[spec.fsdp_dim], *shard_range(length, dp_size, dp_rank))
    return [box for box in product(*ranges) if all(stop > start for start, stop in box)]


def _chunk_ranges(chunk_sizes: tuple[int, ...], tp_rank: int, tp_size: int) -> list[tuple[int, int]]:
    """The ranges that a tensor-parallel rank has of consecutive chunks, one of each chunk."""
    ranges, chunk_start = [], 0
    for size in chunk_sizes:
        start, stop = shard_range(size, tp_size, tp_rank)
        ranges.append((chunk_start + start, chunk_start + stop))
        chunk_start += size
    return ranges


def _slice_ranges(ranges: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """Elements `first` to before `last` of the concatenation of some ranges.

    >>> _slice_ranges([(0, 4), (10, 14)], 3, 6)
    [(3, 4), (10, 12)]
    """
    result, position = [], 0
    for start, stop in ranges:
        length = stop - start
        low, high = max(first - position, 0), min(last - position, length)
        if high > low:
            result.append((start + low, start + high))
        position += length
    return result
