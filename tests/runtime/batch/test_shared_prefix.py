"""What all rows of a batch begin with is computed once: where that is so, and with which losses and gradients."""

from unittest import mock

import pytest
import torch

from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.runtime.batch import packing, shared_prefix
from moreh.runtime.batch.micro_batches import useful_lengths
from moreh.runtime.batch.model_inputs import read_inputs
from moreh.runtime.engine.fast_path import FastPath
from moreh.runtime.sharding.mesh import mesh_of_one
from tests.helpers.families import make_model
from tests.helpers.fast_path_cases import LENGTH, MAX_TOKENS, ROWS, batch, differences
from tests.helpers.float64 import exact_float64

pytestmark = pytest.mark.usefixtures("few_label_positions")

CPU = mesh_of_one(torch.device("cpu"))
PREFIX = 5
BATCH_CUTTER = "moreh.runtime.batch.batch_cutter"


def rows(model, prefix=PREFIX):
    """Rows of different lengths that begin alike and have labels behind that; one without any label."""
    torch.manual_seed(1)
    ids = torch.randint(4, model.config.get_text_config().vocab_size, (ROWS, LENGTH))
    ids[:, :prefix] = ids[0, :prefix]
    ids[:, prefix] = torch.arange(ROWS)
    labels = ids.clone()
    labels[:, : prefix + 1] = -100
    for row in range(ROWS):
        labels[row, LENGTH - row % 3 :] = -100
    labels[3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}


def shared(model, given):
    inputs = read_inputs(model, (), given)
    return shared_prefix.shared_prefix(model, model.config.get_text_config(), inputs, useful_lengths(inputs))


def packed(model, given, parts):
    inputs = read_inputs(model, (), given)
    return packing.pack_micro_batches(model, inputs, useful_lengths(inputs), parts, 1, CPU, 1, PREFIX)


@pytest.mark.parametrize("family", sorted(packing.PACKABLE_FAMILIES))
def test_families(family):
    model = make_model(family)
    with mock.patch(f"{BATCH_CUTTER}.pack_micro_batches", wraps=packing.pack_micro_batches) as used:
        assert max(differences(model, rows(model))) < 1e-9
    assert used.call_args.args[-1] == (PREFIX if takes_mask(model) else 0)


def takes_mask(model):
    return shared_prefix.accepts_pairwise_mask(model.config.get_text_config(), LENGTH)


def test_most_families_share():
    assert sum(takes_mask(make_model(family)) for family in packing.PACKABLE_FAMILIES) > 20


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", [1, MAX_TOKENS, 1000])
def test_without_attention_in_blocks(family, tokens):
    """Then the mask says which tokens see each other."""
    model = make_model(family)
    options = ParallelOptions(disable=("block_attention",))
    assert max(differences(model, rows(model), options, max_tokens=tokens)) < 1e-9


@torch.no_grad()
def test_evaluation():
    model = make_model("llama").eval()
    with (
        exact_float64(),
        mock.patch(f"{BATCH_CUTTER}.pack_micro_batches", wraps=packing.pack_micro_batches) as used,
    ):
        seen = FastPath(DEFAULT_OPTIONS).call(model, (), rows(model), MAX_TOKENS).loss
        assert seen.item() == pytest.approx(model(**rows(model)).loss.item(), rel=1e-9)
    assert used.call_args.args[-1] == PREFIX


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        # One token more than the rows have in common; the others' first keys forgotten; only in the mask of pairs forgotten.
        (f"{BATCH_CUTTER}.shared_prefix", lambda *given: PREFIX + 1),
        ("moreh.runtime.kernels.attention._shared_prefix_len", lambda *given: 0),
        ("moreh.runtime.batch.packing._with_pairwise_mask", lambda one, shared: one),
    ],
)
def test_comparison_finds_another_prefix(name, broken):
    model = make_model("llama")
    options = ParallelOptions(disable=("block_attention",) if "mask" in name else ())
    with mock.patch(name, broken):
        assert min(differences(model, rows(model), options)) > 1e-6


def test_long_prefixes_are_packed():
    model = make_model("llama")
    inputs = read_inputs(model, (), batch(model, attention_mask=None))
    lengths = torch.full((ROWS,), 1000)
    assert not packing.can_pack(model, inputs, lengths, 1, CPU)
    assert packing.can_pack(model, inputs, lengths, 1, CPU, 900)
    assert not packing.can_pack(model, inputs, lengths, 1, CPU, 600)


@pytest.mark.parametrize("parts", [2, ROWS + 1])
def test_prefix_is_in_each_packed_row_once(parts):
    model = make_model("llama")
    given = rows(model)
    cut = packed(model, given, parts)
    prefix = given["input_ids"][0, :PREFIX]
    labels = []
    assert len(cut) == parts
    for one in cut:
        ids, positions = one.tensors["input_ids"][0], one.tensors["position_ids"][0]
        has_texts = bool((one.labels != -100).any())
        assert torch.equal(ids[:PREFIX], prefix) == has_texts
        assert positions.tolist().count(0) == has_texts
        assert positions.max() < LENGTH
        starts, keys = one.others["cu_seq_lens_q"], one.others["cu_seq_lens_k"]
        assert set((keys.diff() - starts.diff())[1:].tolist()) == {PREFIX}
        assert one.others["max_length_k"] <= LENGTH
        labels += one.labels[one.labels != -100].tolist()
    # Of each row but the fourth: what stands behind the last label is not there at all.
    expected = read_inputs(model, (), given).labels
    assert sorted(labels) == sorted(expected[expected != -100].tolist())


def test_tokens_of_a_packed_row():
    lengths = torch.tensor([30, 30, 30, 1])
    assert packing.num_packed_rows(lengths, 70, 1) == 2
    assert packing.num_packed_rows(lengths, 70, 1, prefix_len=20) == 1
    # Of one text each, however many tokens a micro-batch may have.
    assert packing.num_packed_rows(lengths, 20, 1, prefix_len=25) == packing.num_packed_rows(lengths, 20, 3, prefix_len=25) == 3


def test_what_rows_have_in_common():
    model = make_model("llama")
    assert shared(model, rows(model)) == PREFIX
    assert shared(model, rows(model, 3)) == 0
    early = rows(model)
    # At the position before it.
    early["labels"][1, PREFIX] = 7
    assert shared(model, early) == PREFIX - 1 == shared_prefix.MIN_SHARED_TOKENS
    early["labels"][1, PREFIX - 1] = 7
    assert shared(model, early) == 0
    alone = rows(model)
    alone["labels"][1:] = -100
    assert shared(model, alone) == 0
    assert shared(model, batch(model)) == 0


@pytest.mark.parametrize(("family", "rate"), [("gpt2", "resid_pdrop"), ("mixtral", "router_jitter_noise")])
def test_rows_that_something_random_happens_to_are_not_alike(family, rate):
    model = make_model(family)
    model.config.sliding_window = None
    setattr(model.config, rate, 0.1)
    assert shared(model.train(), rows(model)) == 0
    assert shared(model.eval(), rows(model)) == PREFIX


def test_dropout_of_an_adapter():
    model = make_model("llama").train()
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(torch.nn.Dropout(0.1), model.model.layers[0].mlp.up_proj)
    assert shared(model, rows(model)) == 0


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 3), ("_attn_implementation", "eager")])
def test_attention_that_takes_no_mask_of_pairs(name, value):
    model = make_model("mistral")
    setattr(model.config, name, value)
    assert shared(model, rows(model)) == 0
    assert max(differences(model, rows(model))) < 1e-9
