"""One worker's micro-batches, without padding and with logits only at labels: the loss and gradients of the batch."""

import copy
from unittest import mock

import pytest
import torch

from moreh.errors import OptionError
from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.runtime.batch import micro_batches
from moreh.runtime.batch.loss_output import LazyOutput
from moreh.runtime.batch.model_inputs import read_inputs
from moreh.runtime.engine.fast_path import FastPath
from moreh.runtime.kernels.recomputation import recompute_activations
from moreh.runtime.pipeline.stubs import LastMlpAtPositions
from moreh.runtime.sharding.mesh import single_rank_mesh
from tests.helpers.fast_path_cases import LENGTH, MAX_TOKENS, ROWS, batch, differences, gradients
from tests.helpers.float64 import exact_float64
from tests.helpers.models.families import FAMILIES, NOT_TENSOR_PARALLEL, make_model

VARIANTS = [
    DEFAULT_OPTIONS,
    ParallelOptions(disable=("skip_padding",)),
    ParallelOptions(disable=("logits_at_labels",)),
    ParallelOptions(disable=("skip_padding", "logits_at_labels")),
    ParallelOptions(disable=("fused_norm",)),
]
short_rows = pytest.mark.usefixtures("few_label_positions")
useful_lengths, label_positions = micro_batches.useful_lengths, micro_batches.label_positions


@short_rows
@pytest.mark.parametrize("family", ["llama", "gpt2", *FAMILIES, *NOT_TENSOR_PARALLEL])
def test_loss_and_gradients_are_those_of_a_whole_pass(family):
    model = make_model(family)
    assert max(differences(model, batch(model))) < 1e-9


@short_rows
@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "+".join(options.disable) or "all on")
def test_equal_with_optimizations_switched_off(options):
    model = make_model("gpt2")
    assert max(differences(model, batch(model), options)) < 1e-9


@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {"max_position_embeddings": 128}), ("gpt2", {"n_positions": 128})]
)
def test_long_rows_with_the_position_multiple_of_production(family, settings):
    model = make_model(family, **settings)
    inputs = batch(model, length=96)
    # So few labels that positions are left out.
    inputs["labels"] = inputs["labels"].masked_fill(torch.arange(96) % 3 > 0, -100)
    positions = []

    def recorded(micro_batch):
        positions.append(label_positions(micro_batch))
        return positions[-1]

    with mock.patch("moreh.runtime.engine.model_runner.label_positions", recorded):
        assert max(differences(model, inputs, max_tokens=300)) < 1e-9
    assert {len(chosen) % 64 for chosen in positions} == {0}


@short_rows
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("batch.batch_cutter.useful_lengths", lambda inputs: useful_lengths(inputs).clamp(max=LENGTH - 2)),
        (
            "engine.model_runner.label_positions",
            lambda micro_batch: (micro_batch.labels != -100).flatten().nonzero().squeeze(1)[:-1],
        ),
    ],
    ids=["useful tokens", "labels"],
)
def test_comparison_finds_tokens_that_are_left_out(name, broken):
    model = make_model("llama")
    with mock.patch(f"moreh.runtime.{name}", broken):
        assert min(differences(model, batch(model))) > 1e-6


@short_rows
@pytest.mark.parametrize("index", [0, 5, -1])
def test_comparison_finds_a_gradient_that_is_not_a_number(index):
    def to_nan(grads):
        list(grads.values())[index].view(-1)[0] = float("nan")

    model = make_model("llama")
    assert differences(model, batch(model), change_grads=to_nan)[1] == float("inf")


def tokens_of_mlps(model, fast_path):
    """How many tokens the MLP of each layer is called with for the whole batch.

    Counted where the class is known: hooks, and methods of the test's own, would have the model's own forward pass.
    """
    tokens = []
    call_impl = torch.nn.Module._call_impl

    def counted(module, *args, **kwargs):
        if type(module).__name__ == "LlamaMLP":
            tokens.append(args[0].shape[0] * args[0].shape[1])
        return call_impl(module, *args, **kwargs)

    with mock.patch("moreh.models.known_computation.LibraryFunctions.are_unchanged", return_value=True):
        assert isinstance(fast_path.call(model, (), batch(model), ROWS * LENGTH), LazyOutput)
        tokens.clear()
        with (
            mock.patch.object(torch.nn.Module, "_wrapped_call_impl", counted),
            mock.patch.object(torch.nn.Module, "__call__", counted),
        ):
            assert isinstance(fast_path.call(model, (), batch(model), ROWS * LENGTH), LazyOutput)
    return tokens


@short_rows
def test_mlp_of_the_last_layer_is_computed_at_label_positions_only():
    model, fast_path = make_model("llama"), FastPath(DEFAULT_OPTIONS)
    *earlier, last = tokens_of_mlps(model, fast_path)
    labels = int((batch(model)["labels"][:, 1:] != -100).sum())
    assert labels <= last < labels + micro_batches.POSITIONS_MULTIPLE
    assert len(set(earlier)) == 1
    assert last < earlier[0]
    # What recomputation repeats is the layer as it is.
    recompute_activations(model, "full")
    model.train()
    assert len(set(tokens_of_mlps(model, fast_path))) == 1
    assert max(differences(model, batch(model))) < 1e-9


@short_rows
def test_comparison_finds_a_wrong_position_in_the_last_mlp():
    model = make_model("llama")
    forward = LastMlpAtPositions.forward

    def shifted(self, hidden_states):
        return forward(self, hidden_states).roll(1, 1)

    with mock.patch.object(LastMlpAtPositions, "forward", shifted):
        assert min(differences(model, batch(model))) > 1e-6


def left_padded(inputs):
    """The rows of a batch pushed to the right."""
    lengths = inputs["attention_mask"].sum(1)
    order = (torch.arange(LENGTH)[None] - (LENGTH - lengths)[:, None]) % LENGTH
    return {name: tensor.gather(1, order) if torch.is_tensor(tensor) else tensor for name, tensor in inputs.items()}


@short_rows
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize(
    "change",
    [
        left_padded,
        # A script that forgets to mask the labels of padding trains on it, and attends to no padding.
        lambda inputs: inputs | {"labels": inputs["input_ids"]},
        lambda inputs: inputs | {"attention_mask": None},
        lambda inputs: inputs | {"num_items_in_batch": torch.tensor(17)},
        lambda inputs: inputs | {"labels": torch.full_like(inputs["labels"], -100).index_fill(1, torch.tensor([5]), 3)},
        lambda inputs: {name: tensor[:1] if torch.is_tensor(tensor) else tensor for name, tensor in inputs.items()},
    ],
    ids=["left-padded", "labels on padding", "no mask", "loss divisor", "one label", "one row"],
)
def test_equal_for_every_kind_of_batch(family, change):
    model = make_model(family)
    assert max(differences(model, change(batch(model)))) < 1e-9


@short_rows
def test_equal_with_position_ids():
    model = make_model("llama")
    inputs = batch(model, position_ids=torch.arange(LENGTH)[None] * 2)
    assert max(differences(model, inputs)) < 1e-9


def test_model_that_sees_the_future_is_not_shortened():
    """Bidirectional attention: tokens after the labels count."""
    model = make_model("gemma")
    model.config.use_bidirectional_attention = True
    assert not micro_batches.is_causal_model(model)
    assert micro_batches.is_causal_model(make_model("llama"))


@short_rows
def test_evaluation_gives_the_loss_and_other_outputs_later():
    model = make_model("llama").eval()
    inputs = batch(model)
    with exact_float64(), torch.no_grad():
        whole = model(**inputs)
        outputs = FastPath(DEFAULT_OPTIONS).call(model, (), inputs, MAX_TOKENS)
        assert outputs.loss.item() == pytest.approx(whole.loss.item(), rel=1e-9)
        assert outputs[0] is outputs.loss is outputs["loss"]
        assert "logits" not in outputs.__dict__
        torch.testing.assert_close(outputs.logits, whole.logits)
    assert list(outputs) == ["loss", "logits"] == list(outputs.keys())
    assert len(outputs.to_tuple()) == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = outputs.nothing


def test_logits_of_a_training_batch_can_be_read_until_weights_are_changed_by_hand():
    model = make_model("llama")
    outputs = FastPath(DEFAULT_OPTIONS).call(model, (), batch(model), MAX_TOKENS)
    outputs.loss.backward()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    with pytest.raises(OptionError, match="before the optimizer's step"):
        _ = outputs.logits


@pytest.mark.parametrize(
    "arguments",
    [{"output_hidden_states": True}, {"return_dict": False}, {"labels": None}],
    ids=["hidden states", "tuple", "no labels"],
)
def test_call_for_more_than_the_loss_is_left_to_the_model(arguments):
    model = make_model("llama")
    assert FastPath(DEFAULT_OPTIONS).call(model, (), batch(model) | arguments, MAX_TOKENS) is NotImplemented


@pytest.mark.parametrize(
    ("name", "length"), [("attention_mask", 5), ("attention_mask", 20), ("labels", 5), ("labels", 20)]
)
def test_call_whose_tensors_do_not_fit_together_is_left_to_the_model(name, length):
    """transformers cuts a mask that is too long, and raises an error of its own for labels."""
    model = make_model("llama")
    inputs = batch(model)
    other = torch.nn.functional.pad(inputs[name], (0, 20), value=1)[:, :length]
    assert FastPath(DEFAULT_OPTIONS).call(model, (), inputs | {name: other}, MAX_TOKENS) is NotImplemented


def test_gradient_hooks_see_whole_gradients():
    model = make_model("llama")
    model.lm_head.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    assert FastPath(DEFAULT_OPTIONS).call(model, (), batch(model), MAX_TOKENS) is NotImplemented


@short_rows
def test_frozen_parameters_and_exchanged_layers_are_noticed():
    model = make_model("llama")
    fast_path = FastPath(DEFAULT_OPTIONS)
    fast_path.call(model, (), batch(model), MAX_TOKENS).loss.backward()
    model.zero_grad()
    model.model.embed_tokens.weight.requires_grad_(False)
    other = copy.deepcopy(model)
    model.model.layers[0] = copy.deepcopy(model.model.layers[1])
    other.model.layers[0] = copy.deepcopy(other.model.layers[1])
    with exact_float64():
        fast_path.call(model, (), batch(model), MAX_TOKENS).loss.backward()
        other(**batch(other)).loss.backward()
    actual, expected = gradients(model), gradients(other)
    trainable = {name for name, _ in model.named_parameters()} - {"model.embed_tokens.weight"}
    assert actual.keys() == expected.keys() == trainable
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name])


def test_dropout_is_drawn_anew_in_each_call():
    model = make_model("gpt2", resid_pdrop=0.3)
    fast_path = FastPath(DEFAULT_OPTIONS)
    torch.manual_seed(0)
    losses = [fast_path.call(model, (), batch(model), MAX_TOKENS).loss.item() for _ in range(2)]
    torch.manual_seed(0)
    assert fast_path.call(model, (), batch(model), MAX_TOKENS).loss.item() == losses[0] != losses[1]


@pytest.mark.parametrize("multiple", [1, 8])
def test_micro_batches_have_similar_rows(multiple):
    """None has more tokens than allowed, the longest rows come first, and nothing after the last label is left."""
    model = make_model("llama")
    inputs = read_inputs(model, (), batch(model))
    lengths = useful_lengths(inputs)
    device = torch.device("cpu")
    cut = micro_batches.micro_batches_by_length(inputs, lengths, MAX_TOKENS, 1, single_rank_mesh(device), multiple)
    widths = [micro_batch.sequence_length for micro_batch in cut]
    assert widths == sorted(widths, reverse=True)
    assert all(micro_batch.batch_size * micro_batch.sequence_length <= MAX_TOKENS for micro_batch in cut)
    assert sum(micro_batch.batch_size for micro_batch in cut) == ROWS
    assert widths[0] == -(-int(lengths.max()) // multiple) * multiple
    assert sum(int((micro_batch.labels != -100).sum()) for micro_batch in cut) == int((inputs.labels != -100).sum())
