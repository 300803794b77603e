"""Sequences packed into rows: where they go, and that each family computes the same as for rows of their own."""

from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch

from moreh.models.families import packable_families
from moreh.options import ParallelOptions
from moreh.runtime.batch import packing
from moreh.runtime.batch.micro_batches import useful_lengths
from moreh.runtime.batch.model_inputs import read_inputs
from moreh.runtime.sharding.mesh import single_rank_mesh
from tests.helpers.fast_path_cases import LENGTH, MAX_TOKENS, batch, differences
from tests.helpers.models.families import make_model

pytestmark = pytest.mark.usefixtures("few_label_positions")

CPU = single_rank_mesh(torch.device("cpu"))
PACK = "moreh.runtime.batch.batch_cutter.pack_micro_batches"


def packed(model, num_rows=2, sequence_multiple=1):
    inputs = read_inputs(model, (), batch(model))
    seq_lens = useful_lengths(inputs)
    return inputs, packing.pack_micro_batches(model, inputs, seq_lens, num_rows, 1, CPU, sequence_multiple)


@pytest.mark.parametrize("family", packable_families())
def test_packable_family_computes_the_same(family):
    model = make_model(family)
    with mock.patch(PACK, wraps=packing.pack_micro_batches) as pack:
        assert max(differences(model, batch(model))) < 1e-9
    assert pack.called


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_sequences_are_told_apart_without_block_attention(family):
    """Then transformers' mask does it."""
    model = make_model(family)
    assert max(differences(model, batch(model), ParallelOptions(disable=("block_attention",)))) < 1e-9


@pytest.mark.parametrize("with_pairwise_mask", [True, False])
def test_window_smaller_than_a_sequence_is_kept(with_pairwise_mask):
    """A mask of whole sequences would be taken as it is, and the window be forgotten."""
    model = make_model("mistral")
    model.config.sliding_window = 3
    accepts = mock.patch("moreh.runtime.batch.packing.accepts_pairwise_mask", return_value=True)
    with accepts if with_pairwise_mask else nullcontext():
        result = differences(model, batch(model))
    assert min(result) > 1e-6 if with_pairwise_mask else max(result) < 1e-9


def pack_as_one_sequence(*arguments):
    """Each row as a single sequence."""
    return [
        replace(
            row,
            tensors={
                "input_ids": row.tensors["input_ids"],
                "position_ids": torch.arange(row.sequence_length)[None] % LENGTH,
            },
        )
        for row in packing.pack_micro_batches(*arguments)
    ]


def pack_with_late_beginnings(*arguments):
    """Each sequence but the first begins a token late."""
    rows = []
    for row in packing.pack_micro_batches(*arguments):
        cu_seqlens = row.others["cu_seq_lens_q"].clone()
        cu_seqlens[1:-1] += 1
        rows.append(replace(row, others={**row.others, "cu_seq_lens_q": cu_seqlens}))
    return rows


@pytest.mark.parametrize("broken", [pack_as_one_sequence, pack_with_late_beginnings])
def test_comparison_finds_sequences_that_see_each_other(broken):
    model = make_model("llama")
    with mock.patch(PACK, broken):
        assert min(differences(model, batch(model))) > 1e-6


def test_every_label_is_in_one_row_once():
    model = make_model("llama")
    inputs, rows = packed(model)
    assert len(rows) == 2
    for row in rows:
        assert row.batch_size == 1
        assert row.sequence_length == packing.LENGTH_MULTIPLE
        cu_seqlens = row.others["cu_seq_lens_q"]
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == row.sequence_length
        assert int((row.tensors["position_ids"] == 0).sum()) == len(cu_seqlens) - 1
        assert int(row.tensors["position_ids"].max()) < LENGTH
    labels = torch.cat([row.labels[row.labels != -100] for row in rows])
    expected = inputs.labels[inputs.labels != -100]
    assert sorted(labels.tolist()) == sorted(expected.tolist())


def test_rows_are_a_multiple_of_the_sequence_parallel_ranks():
    assert packed(make_model("llama"), sequence_multiple=3)[1][0].sequence_length % 3 == 0


def test_number_of_packed_rows_follows_tokens_and_ranks():
    seq_lens = torch.tensor([30, 20, 10])
    assert packing.num_packed_rows(seq_lens, MAX_TOKENS, 1) == 2
    assert packing.num_packed_rows(seq_lens, MAX_TOKENS, 4) == 4
    assert packing.num_packed_rows(seq_lens, 1000, 1) == 1
    assert packing.num_packed_rows(seq_lens * 100, 10**6, 1) == 2


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bloom", {}),
        ("llama", {"position_ids": torch.arange(LENGTH)[None]}),
        ("llama", {"attention_mask": torch.ones(7, 1, LENGTH, LENGTH, dtype=torch.bool).tril()}),
    ],
    ids=["unknown family", "position ids", "mask of pairs"],
)
def test_batch_that_a_model_would_compute_otherwise_is_not_packed(family, changes):
    model = make_model(family)
    inputs = read_inputs(model, (), batch(model, **changes))
    assert not packing.can_pack(model, inputs, useful_lengths(inputs), 1, CPU)


def test_long_sequences_and_rows_are_not_packed():
    model = make_model("llama")
    inputs = read_inputs(model, (), batch(model, attention_mask=None))
    assert packing.can_pack(model, inputs, torch.full((7,), 500), 1, CPU)
    assert not packing.can_pack(model, inputs, torch.full((8,), 500), 1, CPU)
    assert packing.can_pack(model, inputs, torch.full((8,), 500), 2, CPU)
    assert packing.can_pack(model, inputs, torch.full((7,), packing.MAX_SEQUENCE_LENGTH), 4, CPU)
    assert not packing.can_pack(model, inputs, torch.full((7,), packing.MAX_SEQUENCE_LENGTH + 1), 4, CPU)


def test_left_padding_is_not_packed():
    model = make_model("llama")
    inputs = batch(model)
    inputs = read_inputs(model, (), inputs | {"attention_mask": inputs["attention_mask"].flip(1)})
    assert not packing.can_pack(model, inputs, useful_lengths(inputs), 1, CPU)
