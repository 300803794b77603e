"""Calls that the fast path leaves to a model's own forward pass, and what scripts may do with a model between calls."""

import pytest
import torch

from moreh.errors import OptionError
from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.engine.fast_path import FastPath
from tests.helpers.compare import max_difference, worst
from tests.helpers.fast_path_cases import LENGTH, MAX_TOKENS, ROWS, batch, differences
from tests.helpers.float64 import exact_float64
from tests.helpers.models.family_settings import FAMILY_SETTINGS
from tests.helpers.tensor_cases import whole_model

pytestmark = pytest.mark.usefixtures("few_label_positions")


def llama(**changes):
    return whole_model("llama", changes)


def call(model, fast_path=None, **changes):
    return (fast_path or FastPath(DEFAULT_OPTIONS)).call(model, (), batch(model, **changes), MAX_TOKENS)


@pytest.mark.parametrize(
    "changes",
    [
        {"ignore_index": 0},
        {"adapter_names": ["a"] * ROWS},
        {"attention_mask": {"full_attention": None}},
        {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)},
        {"labels": torch.ones(ROWS, LENGTH, dtype=torch.int32)},
        {"input_ids": torch.ones(ROWS, LENGTH)},
        {"input_ids": torch.ones(ROWS, LENGTH, 1, dtype=torch.int64)},
        {"position_ids": torch.ones(ROWS, LENGTH)},
        {"position_ids": torch.ones(1, 2, dtype=torch.int64)},
        {"attention_mask": torch.ones(ROWS, LENGTH, LENGTH, dtype=torch.bool)},
        {"attention_mask": torch.ones(ROWS, 1, 2, 2, dtype=torch.bool)},
        {"attention_mask": torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.int64)},
    ],
    ids=[
        *("ignored label", "adapters of rows", "masks by kind", "mask of other rows", "labels of another dtype"),
        *("ids of another dtype", "ids of another shape", "positions of another dtype", "positions of another shape"),
        *("mask of three dimensions", "mask of another shape", "mask of another dtype"),
    ],
)
def test_calls_that_ask_for_more_run_the_models_own_forward(changes):
    model = llama()
    assert FastPath(DEFAULT_OPTIONS).call(model, (), {**batch(model), **changes}, MAX_TOKENS) is NotImplemented


def test_float16_autocast_runs_the_models_own_forward():
    model = llama().float()
    with torch.autocast("cpu", dtype=torch.float16):
        assert call(model) is NotImplemented
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(model) is not NotImplemented


def test_computed_parameters_run_the_models_own_forward():
    model = llama()
    fast_path = FastPath(DEFAULT_OPTIONS)
    computed = {name: 1.0 * parameter for name, parameter in model.named_parameters()}
    with torch.nn.utils.stateless._reparametrize_module(model, computed):
        assert call(model, fast_path) is NotImplemented


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "changes",
    [
        # One text with jumps; transformers looks for several texts only where there is no cache.
        {"position_ids": torch.arange(LENGTH)[None] * 2, "attention_mask": None, "use_cache": True},
        {"position_ids": torch.arange(LENGTH)[None] % 5, "attention_mask": None, "use_cache": None},
        {"position_ids": torch.arange(LENGTH)[None] % 5, "attention_mask": None, "use_cache": False},
        # A prefix that sees all of itself, the same for all rows.
        {
            "attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
            .tril()
            .index_fill(3, torch.arange(4), True)
        },
    ],
    ids=["positions that jump", "cache by default", "several texts", "mask of pairs"],
)
def test_unusual_positions_and_masks_give_the_same_loss(family, changes):
    model = whole_model(family, FAMILY_SETTINGS[family])
    inputs = {name: value for name, value in batch(model, **changes).items() if value is not None}
    assert worst(differences(model, inputs)) < 1e-9


def test_gradients_of_chosen_parameters_are_those_of_the_whole_pass():
    model = llama()
    inputs = batch(model)
    chosen = [model.lm_head.weight, model.model.embed_tokens.weight]
    with exact_float64():
        expected = torch.autograd.grad(model(**inputs).loss, chosen)
        actual = torch.autograd.grad(call(model).loss, chosen)
        call(model).loss.backward(inputs=chosen[:1])
    for gradient, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, reference)
    torch.testing.assert_close(chosen[0].grad, expected[0])
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1


def test_random_numbers_of_the_script_stay_the_same():
    model = llama()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    call(model).loss.backward()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("label", [-1, 10**6])
def test_labels_that_are_no_tokens_raise_torchs_error(label):
    model = llama()
    inputs = batch(model)
    inputs["labels"][0, 2] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        FastPath(DEFAULT_OPTIONS).call(model, (), inputs, MAX_TOKENS)


def test_logits_are_those_of_the_inputs_of_the_call():
    model = llama().eval()
    inputs = batch(model)
    with exact_float64():
        expected = model(**inputs).logits
        outputs = FastPath(DEFAULT_OPTIONS).call(model, (), inputs, MAX_TOKENS)
        for name in ("input_ids", "attention_mask", "labels"):
            inputs[name].zero_()
        assert max_difference(outputs.logits, expected) < 1e-9


def test_logits_of_a_large_mask_that_has_changed_are_refused():
    model = llama()
    mask = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    outputs = call(model, attention_mask=mask)
    mask.logical_not_()
    with pytest.raises(OptionError, match="the model or its inputs have changed"):
        _ = outputs.logits


def test_only_the_last_models_are_kept_in_memory():
    fast_path = FastPath(DEFAULT_OPTIONS)
    for _ in range(6):
        call(llama(), fast_path)
    assert len(fast_path._runners) == 4


@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_options_of_embeddings_run_the_models_own_forward(options):
    model = llama()
    fast_path = FastPath(DEFAULT_OPTIONS)
    assert call(model, fast_path) is not NotImplemented
    vars(model.get_input_embeddings()).update(options)
    assert call(model, fast_path) is NotImplemented


@pytest.mark.parametrize("place", ["configuration", "modules"])
def test_batches_are_cut_again_for_a_model_that_sees_later_tokens(place):
    model = llama()
    fast_path = FastPath(DEFAULT_OPTIONS)
    inputs = batch(model)
    if place == "modules":
        inputs = {**inputs, "attention_mask": None}
    with exact_float64(), torch.no_grad():
        causal = fast_path.call(model, (), inputs, MAX_TOKENS).loss
        if place == "configuration":
            model.config.is_causal = False
        else:
            for layer in model.model.layers:
                layer.self_attn.is_causal = False
        expected = model(**inputs).loss
        assert abs(fast_path.call(model, (), inputs, MAX_TOKENS).loss - expected) < 1e-9
    assert place == "modules" or abs(causal - expected) > 1e-4
    assert fast_path.call(model, (), {**inputs, "is_causal": False}, MAX_TOKENS) is NotImplemented
