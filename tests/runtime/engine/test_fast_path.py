"""One worker's micro-batches, without padding and with logits only at labels: the losses and gradients of the whole batch."""

import copy
from unittest import mock

import pytest
import torch

from moreh.errors import OptionError
from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.runtime.batch import micro_batches
from moreh.runtime.batch.loss_output import LazyLogitsOutput
from moreh.runtime.batch.model_inputs import read_inputs
from moreh.runtime.engine.fast_path import FastPath
from moreh.runtime.kernels.recomputation import recompute_activations
from moreh.runtime.pipeline.stubs import LastMlpAtPositions
from moreh.runtime.sharding.mesh import single_rank_mesh
from tests.helpers import sharded_cases as cases
from tests.helpers.float64 import exact_float64
from tests.helpers.tensor_cases import whole_model
from tests.runtime.engine.test_family_plans import FAMILIES, NOT_TENSOR_PARALLEL

ALL = DEFAULT_OPTIONS
VARIANTS = [
    ALL,
    ParallelOptions(disable=("skip_padding",)),
    ParallelOptions(disable=("logits_at_labels",)),
    ParallelOptions(
        disable=(
            "skip_padding",
            "logits_at_labels",
        )
    ),
    ParallelOptions(disable=("fused_norm",)),
]
ROWS, LENGTH = 7, 12
# Of a micro-batch.
TOKENS = 30


def make(family):
    return whole_model(family, cases.FAMILY_SETTINGS.get(family, {}))


def batch(model, **changes):
    """Rows of different lengths with prompts that are no labels, one without any label."""
    ids, mask, labels = cases.batch(0, model.config.get_text_config().vocab_size, ROWS, LENGTH)
    labels[3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False} | changes


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def differences(model, given, options=ALL, scale=0.5):
    """Of the loss and of the gradients, between a whole forward pass and what the hook computes."""
    with exact_float64():
        whole = model(**given).loss
        (whole * scale).backward()
        expected = gradients(model)
        model.zero_grad()
        outputs = FastPath(options).call(model, (), given, TOKENS)
        assert isinstance(outputs, LazyLogitsOutput)
        (outputs.loss * scale).backward()
    seen = gradients(model)
    model.zero_grad()
    assert seen.keys() == expected.keys()
    # Those of keys' biases are mathematically 0.
    least = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())
    worst = max(
        float((seen[name] - expected[name]).abs().max()) / max(least, float(expected[name].abs().max()))
        for name in seen
    )
    return abs(outputs.loss.item() / whole.item() - 1), worst


@pytest.mark.parametrize("family", ["llama", "gpt2", *FAMILIES, *NOT_TENSOR_PARALLEL])
def test_families(family):
    model = make(family)
    assert max(differences(model, batch(model))) < 1e-9


@pytest.mark.parametrize("options", VARIANTS)
def test_options_one_by_one(options):
    model = make("gpt2")
    assert max(differences(model, batch(model), options)) < 1e-9


useful_lengths = micro_batches.useful_lengths


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("useful_lengths", lambda inputs: useful_lengths(inputs).clamp(max=LENGTH - 2)),
        ("label_positions", lambda given: (given.labels != -100).flatten().nonzero().squeeze(1)[:-1]),
    ],
)
def test_comparison_finds_what_is_left_out(name, broken):
    model = make("llama")
    with mock.patch(f"moreh.runtime.engine.model_runner.{name}", broken):
        assert min(differences(model, batch(model))) > 1e-6


def tokens_of_mlps(model, worker):
    """How many tokens the MLP of each layer is called with for the whole batch."""
    seen = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0] * given[0].shape[1]))
        for layer in model.get_decoder().layers
    ]
    assert isinstance(worker.call(model, (), batch(model), ROWS * LENGTH), LazyLogitsOutput)
    for hook in hooks:
        hook.remove()
    return seen


def test_mlp_of_the_last_layer_at_label_positions_only():
    model, worker = make("llama"), FastPath(ALL)
    *earlier, last = tokens_of_mlps(model, worker)
    labels = int((batch(model)["labels"][:, 1:] != -100).sum())
    assert labels <= last < labels + micro_batches.POSITIONS_MULTIPLE
    assert len(set(earlier)) == 1
    assert last < earlier[0]
    # What recomputation repeats is the layer as it is.
    recompute_activations(model, "full")
    model.train()
    assert len(set(tokens_of_mlps(model, worker))) == 1
    assert max(differences(model, batch(model))) < 1e-9


def test_comparison_finds_a_wrong_position_in_the_last_mlp():
    model = make("llama")
    computed = LastMlpAtPositions.forward

    def shifted(self, given):
        return computed(self, given).roll(1, 1)

    with mock.patch.object(LastMlpAtPositions, "forward", shifted):
        assert min(differences(model, batch(model))) > 1e-6


def left_padded(given):
    """The rows of a batch pushed to the right."""
    lengths = given["attention_mask"].sum(1)
    order = (torch.arange(LENGTH)[None] - (LENGTH - lengths)[:, None]) % LENGTH
    return {name: tensor.gather(1, order) if torch.is_tensor(tensor) else tensor for name, tensor in given.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize(
    "change",
    [
        left_padded,
        # Whoever forgets to mask the labels of padding trains on it, and attends to no padding.
        lambda given: given | {"labels": given["input_ids"]},
        lambda given: given | {"attention_mask": None},
        lambda given: given | {"num_items_in_batch": torch.tensor(17)},
        lambda given: given | {"labels": torch.full_like(given["labels"], -100).index_fill(1, torch.tensor([5]), 3)},
        lambda given: {name: tensor[:1] if torch.is_tensor(tensor) else tensor for name, tensor in given.items()},
    ],
    ids=["left-padded", "labels on padding", "no mask", "loss divisor", "one label", "one row"],
)
def test_batches(family, change):
    model = make(family)
    assert max(differences(model, change(batch(model)))) < 1e-9


def test_position_ids():
    model = make("llama")
    given = batch(model, position_ids=torch.arange(LENGTH)[None] * 2)
    assert max(differences(model, given)) < 1e-9


def test_model_that_sees_the_future_is_not_shortened():
    """Bidirectional attention: what stands behind the labels counts."""
    model = make("gemma")
    model.config.use_bidirectional_attention = True
    assert not micro_batches.is_causal_model(model)
    assert micro_batches.is_causal_model(make("llama"))


def test_evaluation_and_later_outputs():
    model = make("llama").eval()
    given = batch(model)
    with exact_float64(), torch.no_grad():
        whole = model(**given)
        outputs = FastPath(ALL).call(model, (), given, TOKENS)
        assert outputs.loss.item() == pytest.approx(whole.loss.item(), rel=1e-9)
        assert outputs[0] is outputs.loss is outputs["loss"]
        assert "logits" not in outputs.__dict__
        torch.testing.assert_close(outputs.logits, whole.logits)
    assert list(outputs) == ["loss", "logits"] == list(outputs.keys())
    assert len(outputs.to_tuple()) == 2
    with pytest.raises(AttributeError, match="has no nothing"):
        _ = outputs.nothing


def test_logits_of_a_training_batch():
    """They can be read until the weights change, and give no gradient."""
    model = make("llama")
    given = batch(model)
    worker = FastPath(ALL)
    outputs = worker.call(model, (), given, TOKENS)
    assert outputs.logits.shape[:2] == (ROWS, LENGTH)
    with pytest.raises(OptionError, match="without labels for a loss of your own"):
        outputs.logits.sum().backward()
    outputs = worker.call(model, (), given, TOKENS)
    outputs.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(OptionError, match="before the optimizer's step"):
        _ = outputs.logits


@pytest.mark.parametrize(
    "asked",
    [{"output_hidden_states": True}, {"return_dict": False}, {"labels": None}],
    ids=["hidden states", "tuple", "no labels"],
)
def test_what_only_the_whole_pass_gives(asked):
    model = make("llama")
    assert FastPath(ALL).call(model, (), batch(model) | asked, TOKENS) is NotImplemented


def test_gradient_hooks_see_whole_gradients():
    model = make("llama")
    model.lm_head.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    assert FastPath(ALL).call(model, (), batch(model), TOKENS) is NotImplemented


def test_models_that_change():
    """Frozen parameters, layers of another model in its place."""
    model = make("llama")
    worker = FastPath(ALL)
    worker.call(model, (), batch(model), TOKENS).loss.backward()
    model.zero_grad()
    model.model.embed_tokens.weight.requires_grad_(False)
    other = copy.deepcopy(model)
    model.model.layers[0] = copy.deepcopy(model.model.layers[1])
    other.model.layers[0] = copy.deepcopy(other.model.layers[1])
    with exact_float64():
        worker.call(model, (), batch(model), TOKENS).loss.backward()
        other(**batch(other)).loss.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (name == "model.embed_tokens.weight")
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_dropout_is_drawn_anew_in_each_call():
    model = whole_model("gpt2", {"resid_pdrop": 0.3})
    worker = FastPath(ALL)
    torch.manual_seed(0)
    losses = [worker.call(model, (), batch(model), TOKENS).loss.item() for _ in range(2)]
    torch.manual_seed(0)
    assert worker.call(model, (), batch(model), TOKENS).loss.item() == losses[0] != losses[1]


@pytest.mark.parametrize("multiple", [1, 8])
def test_micro_batches_have_similar_rows(multiple):
    """No micro-batch has more tokens than allowed; the longest rows come first; nothing behind the last label is left, but what
    makes a multiple.
    """
    model = make("llama")
    inputs = read_inputs(model, (), batch(model))
    lengths = useful_lengths(inputs)
    cut = micro_batches.micro_batches_by_length(
        inputs, lengths, TOKENS, 1, single_rank_mesh(torch.device("cpu")), multiple
    )
    widths = [one.sequence_length for one in cut]
    assert widths == sorted(widths, reverse=True)
    assert all(one.rows * one.sequence_length <= TOKENS for one in cut)
    assert sum(one.rows for one in cut) == ROWS
    assert widths[0] == -(-int(lengths.max()) // multiple) * multiple
    assert sum(int((one.labels != -100).sum()) for one in cut) == int((inputs.labels != -100).sum())
