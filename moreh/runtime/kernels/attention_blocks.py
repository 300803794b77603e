"""The blocks that causal attention is computed in: which queries and keys they have, and where those lie in memory.

The operands of the blocks' products must be contiguous. One operation copies them all, by the numbers of their rows, and
another puts back what the blocks give: that is several times as fast as a copy for each block.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

# Queries of a block: its scores fit the cache of a core, and few keys behind a query are multiplied in vain.
BLOCK = 128
# Texts are filled up to multiples of this with what follows them: oneDNN compiles a kernel for each shape in bfloat16.
TEXT_MULTIPLE = 32


@dataclass(frozen=True)
class PackedSequences:
    """A row of `length` tokens; `starts` are the first positions of the texts in it, 0 among them.

    All texts begin with the same `shared` tokens, which only the first one has here: the others see them there.
    """

    length: int
    starts: tuple[int, ...]
    shared: int = 0


@dataclass(frozen=True)
class HeadLayout:
    """How `[batch, heads, sequence, size]` lies in memory: the steps of its first three dimensions, in rows of `size`."""

    batch: int
    heads: int
    steps: tuple[int, int, int]


@dataclass(frozen=True)
class Blocks:
    """Blocks of as many queries that see as many keys, which are multiplied together.

    `queries` `[blocks, queries]` and `keys` `[blocks, keys]` are positions in the row; those behind its end stand for nothing.
    `own` are the queries that a block is for (the others belong to other blocks), `seen` the keys that one of those sees. The
    last query is at the last key and sees all of them: what the others do not see is the same in all blocks.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    own: torch.Tensor
    seen: torch.Tensor


@dataclass(frozen=True)
class SegmentSum:
    """Rows that are added up: those from each of `offsets` to the next, of which `rows` are the numbers."""

    rows: torch.Tensor
    offsets: torch.Tensor

    def sums(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[rows, size]` -> `[bags, size]`; zeros where a bag is empty."""
        # The functional form would need a gradient of its weights.
        total: torch.Tensor = torch._embedding_bag_forward_only(tensor, self.rows, self.offsets, False, 0)[0]
        return total


# All layers of a micro-batch have the same.
@lru_cache(maxsize=4)
def blocks_of(texts: PackedSequences) -> list[Blocks]:
    """The blocks that the queries of each text are cut into, those of one shape together.

    Two texts of 160 and 40 tokens are blocks of 128 queries x 128 keys, of 32 x 160 and of 64 x 64. If they share the first 10,
    the second one has 54 queries x 64 keys.
    """
    alike: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for start, stop in zip(texts.starts, (*texts.starts[1:], texts.length), strict=True):
        # Where the text's first token would be if it had all of them.
        origin = start - texts.shared if start > 0 else 0
        for block in range(origin, stop, BLOCK):
            begin, end = max(block, start), min(block + BLOCK, stop)
            if begin < end:
                last = block + -(-(end - block) // TEXT_MULTIPLE) * TEXT_MULTIPLE
                alike.setdefault((last - begin, last - origin), []).append((origin, begin, end))
    found = []
    for (queries, keys), places in alike.items():
        origin, begin, end = torch.tensor(places).T.unsqueeze(-1)
        query, number = begin + torch.arange(queries), torch.arange(keys)
        key = torch.where(number < texts.shared, number, origin + number)
        found.append(Blocks(query, key, query < end, key < end))
    return found


def num_scores(texts: PackedSequences) -> int:
    """Queries times keys of all blocks."""
    return sum(blocks.queries.numel() * blocks.keys.shape[1] for blocks in blocks_of(texts))


@lru_cache(maxsize=2 * BLOCK // TEXT_MULTIPLE)
def causal_bias(queries: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores of a block's queries and of as many last keys: -inf for keys behind the query."""
    return torch.full((queries, queries), float("-inf"), dtype=dtype).triu_(1)


def as_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, HeadLayout]:
    """`[batch, heads, sequence, size]` as the rows `[n, size]` that it is in memory; a copy only where it is none."""
    batch, heads, length, size = tensor.shape
    if tensor.stride(3) != 1 or any(step % size for step in tensor.stride()[:3]):
        tensor = tensor.contiguous()
    of_batch, of_head, of_position = (step // size for step in tensor.stride()[:3])
    last = (batch - 1) * of_batch + (heads - 1) * of_head + (length - 1) * of_position
    return tensor.as_strided((last + 1, size), (size, 1)), HeadLayout(batch, heads, (of_batch, of_head, of_position))


@lru_cache(maxsize=16)
def query_rows(texts: PackedSequences, heads: HeadLayout) -> torch.Tensor:
    """The rows of the queries of all blocks, in the order `[blocks, batch, heads, queries]` for each shape of block."""
    return torch.cat([_numbers(blocks.queries, texts, heads) for blocks in blocks_of(texts)])


@lru_cache(maxsize=16)
def key_rows(texts: PackedSequences, heads: HeadLayout) -> torch.Tensor:
    """As `query_rows`, of the keys."""
    return torch.cat([_numbers(blocks.keys, texts, heads) for blocks in blocks_of(texts)])


@lru_cache(maxsize=16)
def own_query_rows(texts: PackedSequences, heads: HeadLayout) -> SegmentSum:
    """As `query_rows`, with nothing for queries that the blocks are not for."""
    own = _for_all_heads([blocks.own for blocks in blocks_of(texts)], heads)
    counts = own.long()
    return SegmentSum(query_rows(texts, heads)[own], counts.cumsum(0) - counts)


@lru_cache(maxsize=16)
def query_gather_index(texts: PackedSequences, batch: int, heads: int) -> torch.Tensor:
    """Where among the blocks' queries those of `[batch, sequence, heads]` are."""
    target = _side_by_side(texts, batch, heads)
    own = _for_all_heads([blocks.own for blocks in blocks_of(texts)], target)
    places = torch.empty(batch * texts.length * heads, dtype=torch.long)
    places[query_rows(texts, target)[own]] = own.nonzero().squeeze(1)
    return places


@lru_cache(maxsize=16)
def key_scatter_index(texts: PackedSequences, batch: int, heads: int) -> SegmentSum:
    """Where among the blocks' keys those of `[batch, sequence, heads]` are, as often as they are seen."""
    target = _side_by_side(texts, batch, heads)
    seen = _for_all_heads([blocks.seen for blocks in blocks_of(texts)], target)
    keys = key_rows(texts, target)[seen]
    counts = keys.bincount(minlength=batch * texts.length * heads)
    return SegmentSum(seen.nonzero().squeeze(1)[keys.argsort(stable=True)], counts.cumsum(0) - counts)


def _side_by_side(texts: PackedSequences, batch: int, heads: int) -> HeadLayout:
    """`[batch, sequence, heads, size]`, contiguous."""
    return HeadLayout(batch, heads, (texts.length * heads, 1, heads))


def _numbers(positions: torch.Tensor, texts: PackedSequences, heads: HeadLayout) -> torch.Tensor:
    """The rows of positions `[blocks, n]`: `[blocks * batch * heads * n]`."""
    of_batch, of_head, of_position = heads.steps
    each = torch.arange(heads.batch).unsqueeze(1) * of_batch + torch.arange(heads.heads) * of_head
    steps = positions.clamp(max=texts.length - 1) * of_position
    return (each.unsqueeze(-1) + steps.unsqueeze(1).unsqueeze(1)).flatten()


def _for_all_heads(of_positions: list[torch.Tensor], heads: HeadLayout) -> torch.Tensor:
    """`[blocks, n]` each, repeated in the order of `_numbers`."""
    return torch.cat([one[:, None, None].expand(-1, heads.batch, heads.heads, -1).flatten() for one in of_positions])
