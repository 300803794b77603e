"""How many layers each stage of a pipeline gets."""

import numpy as np

from moreh.planner.plan.arrays import Floats, Integers


def even_layers(layers: int, stages: int) -> tuple[int, ...]:
    """`layers` over `stages` as evenly as whole layers allow; the later stages get the larger numbers.

    >>> even_layers(10, 4)
    (2, 2, 3, 3)
    """
    return tuple(layers // stages + (stage >= stages - layers % stages) for stage in range(stages))


def balanced_layers(layers: int, stages: int, embedding: Floats, head: Floats) -> Integers:
    """Layers of each stage such that the slowest stage is as fast as possible, [n, stages].

    `embedding` and `head` are what the first and the last stage have to do besides, in times of a layer, [n].
    A layer that can be left out of several stages is left out of the first ones, which hold the most micro-batches.

    >>> balanced_layers(10, 4, np.array([0.0]), np.array([1.6]))
    array([[2, 3, 3, 2]])
    """
    if stages == 1:
        return np.full((len(head), 1), layers)
    # The slowest stage takes a whole number of layers, or that many besides the embedding or the head.
    start = np.floor((layers + embedding + head) / stages)[:, None] + np.arange(-2, 3)
    steps = np.concatenate([start, start + (embedding % 1)[:, None], start + (head % 1)[:, None]], axis=1)
    tolerance = 1e-9
    first = np.maximum(1, np.floor(steps - embedding[:, None] + tolerance))
    last = np.maximum(1, np.floor(steps - head[:, None] + tolerance))
    middle = np.maximum(1, np.floor(steps + tolerance))
    room = first + last + (stages - 2) * middle
    # The load of the slowest stage, where one layer is the least that a stage can have.
    load = np.maximum(np.maximum(first + embedding[:, None], last + head[:, None]), middle if stages > 2 else 0)
    best = np.argmin(np.where(room >= layers, load, np.inf), axis=1)
    rows = np.arange(len(head))
    result = np.repeat(middle[rows, best][:, None], stages, axis=1)
    result[:, 0], result[:, -1] = first[rows, best], last[rows, best]
    surplus = room[rows, best] - layers
    # Take one layer from each stage that has more than one, from the first on, until the sum is right.
    while np.any(surplus > 0):
        spare = result > 1
        taken = spare & (np.cumsum(spare, axis=1) <= surplus[:, None])
        result -= taken
        surplus -= taken.sum(axis=1)
    return result.astype(np.int64)


def balanced_ranks(layers: int, ranks: int, chunks: int, embedding: Floats, head: Floats, *, folded: bool) -> Integers:
    """Layers of each stage such that the slowest rank, with all its chunks, is as fast as possible, [n, ranks * chunks].

    `folded`: the V-shaped schedule, where the first rank holds the first and the last stage. A rank's layers are spread evenly
    over its chunks, the larger ones later; where a rank gets fewer layers than chunks, the stages are balanced instead.

    >>> balanced_ranks(10, 2, 2, np.array([0.0]), np.array([1.9]), folded=False)
    array([[3, 2, 3, 2]])
    """
    if folded:
        totals = balanced_layers(layers, ranks, embedding + head, np.zeros_like(head))
    else:
        totals = balanced_layers(layers, ranks, embedding, head)
    small, larger = totals // chunks, totals % chunks
    parts = np.stack([small + (chunk >= chunks - larger) for chunk in range(chunks)], axis=1)
    if folded:
        parts[:, 1] = parts[:, 1, ::-1]
    result = parts.reshape(len(head), ranks * chunks)
    scarce = np.any(result < 1, axis=1)
    return np.where(scarce[:, None], balanced_layers(layers, ranks * chunks, embedding, head), result)
