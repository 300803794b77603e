"""The number of layers of each pipeline stage."""

import numpy as np

from moreh.planner.plan.arrays import FloatArray, IntArray


def even_layers(layers: int, stages: int) -> tuple[int, ...]:
    """`layers` over `stages` as evenly as whole layers allow. Later stages get the larger numbers.

    >>> even_layers(10, 4)
    (2, 2, 3, 3)
    """
    return tuple(layers // stages + (stage >= stages - layers % stages) for stage in range(stages))


def layers_balanced_by_stage(layers: int, stages: int, embedding: FloatArray, head: FloatArray) -> IntArray:
    """Layers of each stage such that the slowest stage is as fast as possible, [n, stages].

    Where several stages could have one layer less, the first ones do: they hold the most micro-batches.

    Args:
        embedding: The first stage's work besides its layers, in times of a layer, [n].
        head: The last stage's work besides its layers, in times of a layer, [n].

    >>> layers_balanced_by_stage(10, 4, np.array([0.0]), np.array([1.6]))
    array([[3, 3, 3, 1]])
    """
    if stages == 1:
        return np.full((len(head), 1), layers)
    # The load of the slowest stage is a whole number of layers, or a whole number plus the embedding or the head.
    start = np.floor((layers + embedding + head) / stages)[:, None] + np.arange(-2, 3)
    loads = np.concatenate([start, start + (embedding % 1)[:, None], start + (head % 1)[:, None]], axis=1)
    # For each load, the most layers that the first, the last and any other stage can have.
    tolerance = 1e-9
    first = np.maximum(1, np.floor(loads - embedding[:, None] + tolerance))
    last = np.maximum(1, np.floor(loads - head[:, None] + tolerance))
    middle = np.maximum(1, np.floor(loads + tolerance))
    capacity = first + last + (stages - 2) * middle
    # The load that these layers really give: a stage has at least one layer, however small the load.
    slowest = np.maximum(np.maximum(first + embedding[:, None], last + head[:, None]), middle if stages > 2 else 0)
    best = np.argmin(np.where(capacity >= layers, slowest, np.inf), axis=1)
    rows = np.arange(len(head))
    result = np.repeat(middle[rows, best][:, None], stages, axis=1)
    result[:, 0], result[:, -1] = first[rows, best], last[rows, best]
    surplus = capacity[rows, best] - layers
    # From the first stage on, take a layer from each stage that has more than one, until the sum is right.
    while np.any(surplus > 0):
        has_spare = result > 1
        taken = has_spare & (np.cumsum(has_spare, axis=1) <= surplus[:, None])
        result -= taken
        surplus -= taken.sum(axis=1)
    return result.astype(np.int64)


def layers_balanced_by_rank(
    layers: int, ranks: int, chunks: int, embedding: FloatArray, head: FloatArray, *, folded: bool
) -> IntArray:
    """Layers of each stage such that the slowest rank, over all its chunks, is as fast as possible, [n, stages].

    A rank's layers are spread evenly over its chunks, with the larger numbers in later chunks. Where a rank gets fewer
    layers than chunks, the stages are balanced instead.

    Args:
        embedding: The first stage's work besides its layers, in times of a layer, [n].
        head: The last stage's work besides its layers, in times of a layer, [n].
        folded: Whether the schedule is V-shaped, so that the first rank holds the first and the last stage.

    >>> layers_balanced_by_rank(10, 2, 2, np.array([0.0]), np.array([1.9]), folded=False)
    array([[3, 2, 3, 2]])
    """
    if folded:
        totals = layers_balanced_by_stage(layers, ranks, embedding + head, np.zeros_like(head))
    else:
        totals = layers_balanced_by_stage(layers, ranks, embedding, head)
    per_chunk, remainder = totals // chunks, totals % chunks
    by_chunk = np.stack([per_chunk + (chunk >= chunks - remainder) for chunk in range(chunks)], axis=1)
    if folded:
        by_chunk[:, 1] = by_chunk[:, 1, ::-1]
    result = by_chunk.reshape(len(head), ranks * chunks)
    has_empty_stage = np.any(result < 1, axis=1)
    balanced_by_stage = layers_balanced_by_stage(layers, ranks * chunks, embedding, head)
    return np.where(has_empty_stage[:, None], balanced_by_stage, result)
