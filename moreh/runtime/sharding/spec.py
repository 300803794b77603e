"""Which part of each parameter a rank holds, in coordinates of the whole tensor.

Every rank knows the parts of all ranks without asking, so that weights and checkpoints can be read, written and moved to
another plan piece by piece.
"""

from dataclasses import dataclass

import torch

# A range of every dimension of a whole tensor: start and stop, [dimensions, 2].
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TPSplit:
    """How tensor-parallel ranks divide a parameter along `dim`.

    `blocks` are the sizes of consecutive parts along it that are each divided by themselves, such as the query, key and value
    columns of GPT-2's c_attn: rank r holds the r-th piece of every block, one behind the other.
    """

    dim: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class ParamSpec:
    """Where a parameter is.

    `shape` is that of the whole tensor. `pipeline_ranks` hold it: one, or several where it is tied. Each of them divides it
    over its tensor-parallel ranks as `division` says (None: all hold the same), and what is left to one of them along
    `data_dim` over the data-parallel ranks (None: all hold the same).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pipeline_ranks: tuple[int, ...]
    division: TPSplit | None = None
    data_dim: int | None = None


def shard_range(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """The range that a rank gets of `length` elements, as torch.chunk and DTensor divide: the last ones may get less.

    >>> [shard_range(10, 4, rank) for rank in range(4)]
    [(0, 3), (3, 6), (6, 9), (9, 10)]
    """
    size = -(-length // ranks)
    start = min(rank * size, length)
    return start, min(start + size, length)


def tensor_shape(layout: ParamSpec, tensor_rank: int, tensor_size: int) -> tuple[int, ...]:
    """The shape of what a tensor-parallel rank holds of a parameter, all its data-parallel ranks together."""
    if layout.division is None:
        return layout.shape
    ranges = (shard_range(block, tensor_size, tensor_rank) for block in layout.division.blocks)
    length = sum(stop - start for start, stop in ranges)
    return tuple(length if dim == layout.division.dim else size for dim, size in enumerate(layout.shape))


def shard_boxes(layout: ParamSpec, tensor_rank: int, tensor_size: int, data_rank: int, data_size: int) -> list[Box]:
    """The parts of the whole tensor that a rank holds; concatenated along the division's dimension they are its local tensor.

    There is one box where a tensor is not divided in blocks. Empty ones are left out.
    """
    ranges = {dim: [(0, length)] for dim, length in enumerate(layout.shape)}
    if layout.division is not None:
        start, ranges_divided = 0, []
        for block in layout.division.blocks:
            first, last = shard_range(block, tensor_size, tensor_rank)
            ranges_divided.append((start + first, start + last))
            start += block
        ranges[layout.division.dim] = ranges_divided
    if layout.data_dim is not None:
        held = ranges[layout.data_dim]
        first, last = shard_range(sum(stop - start for start, stop in held), data_size, data_rank)
        ranges[layout.data_dim] = _clip(held, first, last)
    divided_dim = 0 if layout.division is None else layout.division.dim
    single = {dim: ranges[dim][0] if ranges[dim] else (0, 0) for dim in ranges}
    result = []
    for divided in ranges[divided_dim] if layout.shape else []:
        box = tuple(divided if dim == divided_dim else single[dim] for dim in range(len(layout.shape)))
        if all(stop > start for start, stop in box):
            result.append(box)
    return result if layout.shape else [()]


def _clip(held: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """The elements `first` to `last` of ranges that follow each other."""
    clipped, position = [], 0
    for start, stop in held:
        length = stop - start
        low, high = max(first - position, 0), min(last - position, length)
        if high > low:
            clipped.append((start + low, start + high))
        position += length
    return clipped
