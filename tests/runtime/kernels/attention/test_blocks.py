"""The block layout, beside the picture in its module docstring and beside a mask of all pairs of tokens."""

import doctest

import pytest
import torch

from moreh.runtime.kernels.attention import blocks
from moreh.runtime.kernels.attention.blocks import PackedSequences, block_groups, block_shapes

LAYOUTS = [
    PackedSequences((0, 300)),
    PackedSequences((0, 17, 100, 290, 300)),
    PackedSequences((0, 17, 100, 290, 300), 7),
    PackedSequences((0, 300, 301, 460, 700), 270),
]


@pytest.fixture
def blocks_of_four(monkeypatch):
    """Blocks of 4 queries without padding, as in the picture; no cached ones before and after."""

    def clear():
        blocks._block_ranges.cache_clear()
        block_groups.cache_clear()

    clear()
    monkeypatch.setattr(blocks, "BLOCK_QUERIES", 4)
    monkeypatch.setattr(blocks, "QUERY_MULTIPLE", 1)
    yield
    clear()


def rendered(sequences, names):
    """Which keys each query sees (x) and which scores are masked (.), as lines of the picture."""
    length = sequences.cu_seqlens[-1]
    picture = [[" "] * length for _ in range(length)]
    for group in block_groups(sequences):
        for queries, keys in zip(group.query_positions.tolist(), group.key_positions.tolist(), strict=True):
            # The last query is at the last key.
            for query, seen in zip(queries, range(len(keys) - len(queries) + 1, len(keys) + 1), strict=True):
                for index, key in enumerate(keys):
                    picture[query][key] = "x" if index < seen else "."
    return [f"{name}            {'  '.join(line)}".rstrip() for name, line in zip(names, picture, strict=True)]


def test_picture_of_the_module_docstring_is_true(blocks_of_four):
    sequences = PackedSequences((0, 5, 8), prefix_len=2)
    lines = [line.strip() for line in blocks.__doc__.splitlines()]
    for line in rendered(sequences, ["p0", "p1", "a2", "a3", "a4", "b2", "b3", "b4"]):
        assert sum(documented.startswith(line) for documented in lines) == 1, line
    assert block_shapes(sequences) == [(1, 4, 4), (2, 1, 5), (1, 2, 4)]


@pytest.mark.parametrize("sequences", LAYOUTS)
def test_each_query_is_in_one_block_and_sees_its_sequence_and_the_prefix(sequences):
    length = sequences.cu_seqlens[-1]
    count = torch.zeros(length, length, dtype=torch.int)
    for group in block_groups(sequences):
        queries, keys = group.query_positions.shape[1], group.key_positions.shape[1]
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        seen = causal & group.query_mask[:, :, None] & group.key_mask[:, None]
        for query, key, pairs in zip(group.query_positions, group.key_positions, seen, strict=True):
            rows, columns = pairs.nonzero().T
            count[query[rows], key[columns]] += 1
    sequence = sum((torch.arange(length) >= start).int() for start in sequences.cu_seqlens[:-1])
    allowed = (sequence[:, None] == sequence[None]) | (torch.arange(length) < sequences.prefix_len)
    assert torch.equal(count, allowed.tril().int())


def test_example_of_the_docstring_is_true():
    result = doctest.testmod(blocks)
    assert (result.attempted, result.failed) == (1, 0)


@pytest.mark.parametrize("sequences", LAYOUTS)
def test_shapes_are_those_of_the_groups(sequences):
    groups = block_groups(sequences)
    assert block_shapes(sequences) == [(*group.query_positions.shape, group.key_positions.shape[1]) for group in groups]


def test_indices_are_on_the_cpu_whatever_the_default_device_is():
    sequences = PackedSequences((0, 33, 131), 5)  # used by no other test, so nothing is cached
    with torch.device("meta"):
        _, layout = blocks.as_rows(torch.empty(1, 2, 131, 4, device="cpu"))
        index = blocks.token_query_index(sequences, 1, 2)
        sums = blocks.token_key_sum(sequences, 1, 2), blocks.block_grad_sum(sequences, layout)
        bias = blocks.causal_bias(96, torch.float64)
    assert {tensor.device.type for tensor in (index, bias, *(s.index for s in sums), *(s.offsets for s in sums))} == {
        "cpu"
    }
