"""Which boxes of a full tensor the ranks hold."""

from itertools import product

import pytest
import torch

from moreh.runtime.sharding.spec import ParamSpec, TPSplit, shard_boxes, tp_shard_shape

SPECS = {
    "replicated": ParamSpec("a", (6, 5), torch.float32, (0,)),
    "rows": ParamSpec("a", (6, 5), torch.float32, (0,), TPSplit(0, (6,))),
    "columns, sharded": ParamSpec("a", (6, 5), torch.float32, (0,), TPSplit(1, (5,)), 0),
    "rows in chunks of unequal size, sharded": ParamSpec("a", (14, 3), torch.float32, (0,), TPSplit(0, (8, 4, 2)), 0),
    "columns in chunks of unequal size": ParamSpec("a", (3, 14), torch.float32, (0,), TPSplit(1, (8, 4, 2))),
    "fewer rows than ranks": ParamSpec("a", (2, 3), torch.float32, (0,), None, 0),
    "scalar": ParamSpec("a", (), torch.float32, (0,)),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("tp_size", "dp_size"), [(1, 1), (2, 1), (1, 4), (2, 3)])
def test_ranks_hold_every_element_as_often_as_it_is_replicated(name, tp_size, dp_size):
    spec = SPECS[name]
    counts = torch.zeros(spec.shape)
    for tp_rank, dp_rank in product(range(tp_size), range(dp_size)):
        for box in shard_boxes(spec, tp_rank, tp_size, dp_rank, dp_size):
            counts[tuple(slice(start, stop) for start, stop in box)] += 1
    replicas = (tp_size if spec.tp_split is None else 1) * (dp_size if spec.fsdp_dim is None else 1)
    assert torch.equal(counts, torch.full(spec.shape, float(replicas)))


def test_a_rank_holds_its_part_of_every_chunk():
    """The query, key and value rows of two heads of size 4, with one key-value head of size 4 for both."""
    spec = ParamSpec("qkv", (16, 3), torch.float32, (0,), TPSplit(0, (8, 4, 4)))
    assert shard_boxes(spec, 1, 2, 0, 1) == [((4, 8), (0, 3)), ((10, 12), (0, 3)), ((14, 16), (0, 3))]
    assert tp_shard_shape(spec, 1, 2) == (8, 3)


def test_fsdp_shards_what_a_tensor_parallel_rank_has():
    """Rank 1 of 2 has rows 4 to 7 and 10 to 11; the first of two data-parallel ranks gets three of these six."""
    spec = ParamSpec("qkv", (12, 3), torch.float32, (0,), TPSplit(0, (8, 4)), 0)
    assert shard_boxes(spec, 1, 2, 0, 2) == [((4, 7), (0, 3))]
    assert shard_boxes(spec, 1, 2, 1, 2) == [((7, 8), (0, 3)), ((10, 12), (0, 3))]
