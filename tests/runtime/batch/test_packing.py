"""Rows packed one after the other: where they go, and that each family computes the same as for rows by themselves."""

from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch

from moreh.options import ParallelOptions
from moreh.runtime.batch import packing
from moreh.runtime.batch.micro_batches import useful_lengths
from moreh.runtime.batch.model_inputs import read_inputs
from moreh.runtime.sharding.mesh import mesh_of_one
from tests.helpers.families import make_model
from tests.helpers.fast_path_cases import LENGTH, MAX_TOKENS, batch, differences

pytestmark = pytest.mark.usefixtures("few_label_positions")

CPU = mesh_of_one(torch.device("cpu"))


def packed(model, parts=2, sequence_multiple=1):
    inputs = read_inputs(model, (), batch(model))
    lengths = useful_lengths(inputs)
    return inputs, packing.pack_micro_batches(model, inputs, lengths, parts, 1, CPU, sequence_multiple)


@pytest.mark.parametrize("family", sorted(packing.PACKABLE_FAMILIES))
def test_families(family):
    model = make_model(family)
    with mock.patch("moreh.runtime.batch.batch_cutter.pack_micro_batches", wraps=packing.pack_micro_batches) as used:
        assert max(differences(model, batch(model))) < 1e-9
    assert used.called


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_without_attention_in_blocks(family):
    """Then transformers' mask tells the texts apart."""
    model = make_model(family)
    assert max(differences(model, batch(model), ParallelOptions(disable=("block_attention",)))) < 1e-9


@pytest.mark.parametrize("given", [True, False])
def test_a_window_smaller_than_a_text(given):
    """A mask of whole texts would be taken as it is, and the window be forgotten."""
    model = make_model("mistral")
    model.config.sliding_window = 3
    with mock.patch("moreh.runtime.batch.packing.accepts_pairwise_mask", return_value=True) if given else nullcontext():
        found = differences(model, batch(model))
    assert min(found) > 1e-6 if given else max(found) < 1e-9


def one_text(*given):
    """All rows of a packed one as a single text."""
    return [
        replace(
            one,
            tensors={
                "input_ids": one.tensors["input_ids"],
                "position_ids": torch.arange(one.sequence_length)[None] % LENGTH,
            },
        )
        for one in packing.pack_micro_batches(*given)
    ]


def texts_begin_late(*given):
    late = []
    for one in packing.pack_micro_batches(*given):
        starts = one.others["cu_seq_lens_q"].clone()
        starts[1:-1] += 1
        late.append(replace(one, others={**one.others, "cu_seq_lens_q": starts}))
    return late


@pytest.mark.parametrize("broken", [one_text, texts_begin_late])
def test_comparison_finds_texts_that_see_each_other(broken):
    model = make_model("llama")
    with mock.patch("moreh.runtime.batch.batch_cutter.pack_micro_batches", broken):
        assert min(differences(model, batch(model))) > 1e-6


def test_every_label_is_somewhere_once():
    model = make_model("llama")
    inputs, cut = packed(model)
    assert len(cut) == 2
    for one in cut:
        assert one.batch_size == 1
        assert one.sequence_length == packing.LENGTH_MULTIPLE
        starts = one.others["cu_seq_lens_q"]
        assert starts[0] == 0
        assert starts[-1] == one.sequence_length
        assert int((one.tensors["position_ids"] == 0).sum()) == len(starts) - 1
        assert int(one.tensors["position_ids"].max()) < LENGTH
    seen = torch.cat([one.labels[one.labels != -100] for one in cut])
    expected = inputs.labels[inputs.labels != -100]
    assert sorted(seen.tolist()) == sorted(expected.tolist())
    assert packed(model, sequence_multiple=3)[1][0].sequence_length % 3 == 0


def test_number_of_packed_rows():
    lengths = torch.tensor([30, 20, 10])
    assert packing.num_packed_rows(lengths, MAX_TOKENS, 1) == 2
    assert packing.num_packed_rows(lengths, MAX_TOKENS, 4) == 4
    assert packing.num_packed_rows(lengths, 1000, 1) == 1
    assert packing.num_packed_rows(lengths * 100, 10**6, 1) == 2


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bloom", {}),
        ("llama", {"position_ids": torch.arange(LENGTH)[None]}),
        ("llama", {"attention_mask": torch.ones(7, 1, LENGTH, LENGTH, dtype=torch.bool).tril()}),
    ],
)
def test_what_is_not_packed(family, changes):
    model = make_model(family)
    inputs = read_inputs(model, (), batch(model, **changes))
    assert not packing.can_pack(model, inputs, useful_lengths(inputs), 1, CPU)


def test_long_texts_and_rows_are_not_packed():
    model = make_model("llama")
    inputs = read_inputs(model, (), batch(model, attention_mask=None))
    assert packing.can_pack(model, inputs, torch.full((7,), 500), 1, CPU)
    assert not packing.can_pack(model, inputs, torch.full((8,), 500), 1, CPU)
    assert packing.can_pack(model, inputs, torch.full((8,), 500), 2, CPU)
    assert packing.can_pack(model, inputs, torch.full((7,), packing.MAX_SEQUENCE_LENGTH), 4, CPU)
    assert not packing.can_pack(model, inputs, torch.full((7,), packing.MAX_SEQUENCE_LENGTH + 1), 4, CPU)


def test_left_padding_is_not_packed():
    model = make_model("llama")
    given = batch(model)
    inputs = read_inputs(model, (), given | {"attention_mask": given["attention_mask"].flip(1)})
    assert not packing.can_pack(model, inputs, useful_lengths(inputs), 1, CPU)
