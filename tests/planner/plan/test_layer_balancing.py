"""Layers are spread over stages and ranks so that no other spread has a faster slowest one."""

from itertools import product

import numpy as np
import pytest

from moreh.planner.plan.layer_balancing import even_layers, layers_balanced_by_rank, layers_balanced_by_stage
from moreh.planner.plan.stage_layout import stage_to_rank


def slowest_load(layers, first, last, embedding, head):
    """The largest load, in layers, where the places `first` and `last` also have the embedding and the head."""
    loads = np.array(layers, dtype=float)
    loads[first] += embedding[0]
    loads[last] += head[0]
    return loads.max()


def test_even_layers_give_the_later_stages_more():
    assert even_layers(10, 4) == (2, 2, 3, 3)


def test_no_other_layers_have_a_faster_slowest_stage():
    rng = np.random.default_rng(2)
    for _ in range(60):
        layers, stages = int(rng.integers(4, 12)), int(rng.integers(2, 5))
        embedding, head = rng.uniform(0, 1, 1), rng.uniform(0, 3, 1)
        balanced = layers_balanced_by_stage(layers, stages, embedding, head)[0]
        assert balanced.sum() == layers
        others = (counts for counts in product(range(1, layers + 1), repeat=stages) if sum(counts) == layers)
        best = min(slowest_load(counts, 0, -1, embedding, head) for counts in others)
        assert slowest_load(balanced, 0, -1, embedding, head) == pytest.approx(best)


def test_no_other_layers_have_a_faster_slowest_rank():
    rng = np.random.default_rng(4)
    seen = set()
    for _ in range(60):
        ranks, chunks = int(rng.integers(2, 4)), int(rng.integers(2, 4))
        layers = int(rng.integers(2 * ranks * chunks, 20))
        folded = chunks == 2 and bool(rng.integers(2))
        embedding, head = rng.uniform(0, 1, 1), rng.uniform(0, 3, 1)
        balanced = layers_balanced_by_rank(layers, ranks, chunks, embedding, head, folded=folded)[0]
        assert balanced.sum() == layers
        assert balanced.min() >= 1
        rank_of_stage = stage_to_rank("zbv" if folded else "interleaved", ranks, chunks)
        first, last = rank_of_stage[0], rank_of_stage[-1]
        totals = np.bincount(rank_of_stage, balanced, minlength=ranks)
        others = (counts for counts in product(range(chunks, layers + 1), repeat=ranks) if sum(counts) == layers)
        best = min(slowest_load(counts, first, last, embedding, head) for counts in others)
        assert slowest_load(totals, first, last, embedding, head) == pytest.approx(best)
        seen.add((chunks, folded))
    assert seen == {(2, False), (2, True), (3, False)}
