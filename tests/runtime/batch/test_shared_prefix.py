"""A prefix that all sequences of a batch share is computed once: when, and with which losses and gradients."""

from unittest import mock

import pytest
import torch

from moreh.models.families import packable_families
from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.runtime.batch import packing, shared_prefix
from moreh.runtime.batch.micro_batches import useful_lengths
from moreh.runtime.batch.model_inputs import read_inputs
from moreh.runtime.engine.fast_path import FastPath
from moreh.runtime.sharding.mesh import single_rank_mesh
from tests.helpers.fast_path_cases import LENGTH, MAX_TOKENS, ROWS, batch, differences
from tests.helpers.float64 import exact_float64
from tests.helpers.models.families import make_model

pytestmark = pytest.mark.usefixtures("few_label_positions")

CPU = single_rank_mesh(torch.device("cpu"))
PREFIX_LEN = 5
BATCH_CUTTER = "moreh.runtime.batch.batch_cutter"


def batch_with_prefix(model, prefix_len=PREFIX_LEN):
    """Sequences of different lengths that begin alike and have labels after that; one without any label."""
    torch.manual_seed(1)
    ids = torch.randint(4, model.config.get_text_config().vocab_size, (ROWS, LENGTH))
    ids[:, :prefix_len] = ids[0, :prefix_len]
    ids[:, prefix_len] = torch.arange(ROWS)
    labels = ids.clone()
    labels[:, : prefix_len + 1] = -100
    for row in range(ROWS):
        labels[row, LENGTH - row % 3 :] = -100
    labels[3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}


def prefix_of(model, arguments):
    inputs = read_inputs(model, (), arguments)
    return shared_prefix.shared_prefix(model, model.config.get_text_config(), inputs, useful_lengths(inputs))


def pack(model, arguments, num_rows):
    inputs = read_inputs(model, (), arguments)
    return packing.pack_micro_batches(model, inputs, useful_lengths(inputs), num_rows, 1, CPU, 1, PREFIX_LEN)


def accepts_mask(model):
    return shared_prefix.accepts_pairwise_mask(model.config.get_text_config(), LENGTH)


@pytest.mark.parametrize("family", packable_families())
def test_packable_family_computes_the_same(family):
    model = make_model(family)
    with mock.patch(f"{BATCH_CUTTER}.pack_micro_batches", wraps=packing.pack_micro_batches) as used:
        assert max(differences(model, batch_with_prefix(model))) < 1e-9
    assert used.call_args.args[-1] == (PREFIX_LEN if accepts_mask(model) else 0)


def test_most_packable_families_share_a_prefix():
    assert sum(accepts_mask(make_model(family)) for family in packable_families()) > 20


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("max_tokens", [1, MAX_TOKENS, 1000])
def test_mask_tells_which_tokens_see_each_other_without_block_attention(family, max_tokens):
    model = make_model(family)
    options = ParallelOptions(disable=("block_attention",))
    assert max(differences(model, batch_with_prefix(model), options, max_tokens=max_tokens)) < 1e-9


@torch.no_grad()
def test_evaluation_shares_the_prefix():
    model = make_model("llama").eval()
    with (
        exact_float64(),
        mock.patch(f"{BATCH_CUTTER}.pack_micro_batches", wraps=packing.pack_micro_batches) as used,
    ):
        loss = FastPath(DEFAULT_OPTIONS).call(model, (), batch_with_prefix(model), MAX_TOKENS).loss
        assert loss.item() == pytest.approx(model(**batch_with_prefix(model)).loss.item(), rel=1e-9)
    assert used.call_args.args[-1] == PREFIX_LEN


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        (f"{BATCH_CUTTER}.shared_prefix", lambda *arguments: PREFIX_LEN + 1),
        ("moreh.runtime.kernels.attention.dispatch._shared_prefix_len", lambda *arguments: 0),
        ("moreh.runtime.batch.packing._pairwise_mask", lambda packed, prefix_len, device: None),
    ],
    ids=["one token more than is shared", "keys of the prefix forgotten", "prefix forgotten in the mask"],
)
def test_comparison_finds_another_prefix(name, broken):
    model = make_model("llama")
    options = ParallelOptions(disable=("block_attention",) if "mask" in name else ())
    with mock.patch(name, broken):
        assert min(differences(model, batch_with_prefix(model), options)) > 1e-6


def test_long_sequences_with_a_long_prefix_are_packed():
    model = make_model("llama")
    inputs = read_inputs(model, (), batch(model, attention_mask=None))
    seq_lens = torch.full((ROWS,), 1000)
    assert not packing.can_pack(model, inputs, seq_lens, 1, CPU)
    assert packing.can_pack(model, inputs, seq_lens, 1, CPU, 900)
    assert not packing.can_pack(model, inputs, seq_lens, 1, CPU, 600)


@pytest.mark.parametrize("num_rows", [2, ROWS + 1])
def test_prefix_is_in_each_packed_row_once(num_rows):
    model = make_model("llama")
    arguments = batch_with_prefix(model)
    rows = pack(model, arguments, num_rows)
    prefix = arguments["input_ids"][0, :PREFIX_LEN]
    labels = []
    assert len(rows) == num_rows
    for row in rows:
        ids, positions = row.tensors["input_ids"][0], row.tensors["position_ids"][0]
        has_sequences = bool((row.labels != -100).any())
        assert torch.equal(ids[:PREFIX_LEN], prefix) == has_sequences
        assert positions.tolist().count(0) == has_sequences
        assert positions.max() < LENGTH
        cu_seqlens_q, cu_seqlens_k = row.others["cu_seq_lens_q"], row.others["cu_seq_lens_k"]
        assert set((cu_seqlens_k.diff() - cu_seqlens_q.diff())[1:].tolist()) == {PREFIX_LEN}
        assert row.others["max_length_k"] <= LENGTH
        labels += row.labels[row.labels != -100].tolist()
    # Of each sequence but the fourth: tokens after the last label are not there at all.
    expected = read_inputs(model, (), arguments).labels
    assert sorted(labels) == sorted(expected[expected != -100].tolist())


def test_number_of_packed_rows_counts_the_prefix_once_per_row():
    seq_lens = torch.tensor([30, 30, 30, 1])
    assert packing.num_packed_rows(seq_lens, 70, 1) == 2
    assert packing.num_packed_rows(seq_lens, 70, 1, prefix_len=20) == 1
    # One sequence per row, however few tokens a micro-batch may have.
    assert packing.num_packed_rows(seq_lens, 20, 1, prefix_len=25) == 3
    assert packing.num_packed_rows(seq_lens, 20, 3, prefix_len=25) == 3


def test_prefix_ends_at_the_first_difference_or_label():
    model = make_model("llama")
    assert prefix_of(model, batch_with_prefix(model)) == PREFIX_LEN
    assert prefix_of(model, batch_with_prefix(model, 3)) == 0
    early = batch_with_prefix(model)
    # The label is predicted at the position before it.
    early["labels"][1, PREFIX_LEN] = 7
    assert prefix_of(model, early) == PREFIX_LEN - 1 == shared_prefix.MIN_SHARED_TOKENS
    early["labels"][1, PREFIX_LEN - 1] = 7
    assert prefix_of(model, early) == 0


def test_one_sequence_with_labels_shares_nothing():
    model = make_model("llama")
    alone = batch_with_prefix(model)
    alone["labels"][1:] = -100
    assert prefix_of(model, alone) == 0
    assert prefix_of(model, batch(model)) == 0


@pytest.mark.parametrize(("family", "rate"), [("gpt2", "resid_pdrop"), ("mixtral", "router_jitter_noise")])
def test_random_hidden_states_are_not_shared(family, rate):
    model = make_model(family)
    model.config.sliding_window = None
    setattr(model.config, rate, 0.1)
    assert prefix_of(model.train(), batch_with_prefix(model)) == 0
    assert prefix_of(model.eval(), batch_with_prefix(model)) == PREFIX_LEN


def test_dropout_of_an_adapter_prevents_sharing():
    model = make_model("llama").train()
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(torch.nn.Dropout(0.1), model.model.layers[0].mlp.up_proj)
    assert prefix_of(model, batch_with_prefix(model)) == 0


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 3), ("_attn_implementation", "eager")])
def test_attention_that_takes_no_mask_of_pairs_shares_nothing(name, value):
    model = make_model("mistral")
    setattr(model.config, name, value)
    assert prefix_of(model, batch_with_prefix(model)) == 0
    assert max(differences(model, batch_with_prefix(model))) < 1e-9
