"""Outputs of a batch with labels: transformers' own class, whose other fields are computed when they are read."""

import copy
import pickle

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast

from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.batch.loss_output import LazyOutput
from moreh.runtime.batch.model_inputs import CACHE_ARGUMENTS
from moreh.runtime.engine.fast_path import FastPath
from tests.helpers.compare import max_difference, relative_difference
from tests.helpers.fast_path_cases import MAX_TOKENS, batch
from tests.helpers.float64 import exact_float64
from tests.helpers.models.families import make_model


@pytest.fixture
def outputs_and_own():
    """Outputs of the fast path without gradients, and those of the model itself."""
    model = make_model("llama").eval()
    with exact_float64(), torch.no_grad():
        own = model(**batch(model))
        outputs = FastPath(DEFAULT_OPTIONS).call(model, (), batch(model), MAX_TOKENS)
        assert isinstance(outputs, LazyOutput)
        yield outputs, own


@pytest.mark.parametrize(
    ("family", "output_class"),
    [
        ("llama", CausalLMOutputWithPast),
        ("mistral", CausalLMOutputWithPast),
        ("gpt2", CausalLMOutputWithCrossAttentions),
        ("bloom", CausalLMOutputWithCrossAttentions),
    ],
)
def test_class_is_that_of_the_model(family, output_class):
    model = make_model(family).eval()
    with torch.no_grad():
        outputs = FastPath(DEFAULT_OPTIONS).call(model, (), batch(model), MAX_TOKENS)
        assert isinstance(outputs, output_class)
        assert type(outputs).__name__ == output_class.__name__
        assert outputs.logits is not None
        assert type(outputs) is output_class is type(model(**batch(model)))


@pytest.mark.parametrize(
    "read",
    [
        lambda outputs: outputs.get("logits"),
        lambda outputs: outputs["logits"],
        lambda outputs: outputs[1],
        lambda outputs: outputs[:2][1],
        lambda outputs: outputs.to_tuple()[1],
        lambda outputs: dict(outputs)["logits"],
        lambda outputs: {**outputs}["logits"],
        lambda outputs: dict(outputs.items())["logits"],
        lambda outputs: next(reversed(list(outputs.values()))),
        lambda outputs: copy.copy(outputs).logits,
        lambda outputs: copy.deepcopy(outputs).logits,
        lambda outputs: pickle.loads(pickle.dumps(outputs)).logits,
        lambda outputs: torch.utils._pytree.tree_leaves(outputs)[1],
        lambda outputs: type(outputs)(*outputs.to_tuple()).logits,
        lambda outputs: torch.utils._pytree.tree_map(lambda tensor: tensor.clone(), outputs).logits,
    ],
)
def test_logits_are_had_in_each_way(outputs_and_own, read):
    outputs, own = outputs_and_own
    assert relative_difference(read(outputs), own.logits) < 1e-12


def test_what_a_call_does_not_ask_for_is_none_and_costs_nothing(outputs_and_own):
    outputs, own = outputs_and_own
    assert outputs.hidden_states is outputs.attentions is None
    assert outputs.get("attentions") is outputs.get("nothing") is None
    assert outputs.get("attentions", 3) == own.get("attentions", 3) == 3
    assert "loss" in outputs
    assert "attentions" not in outputs
    assert dir(outputs).count("hidden_states") == 1
    assert isinstance(outputs, LazyOutput)  # nothing has been computed
    assert outputs.past_key_values is own.past_key_values is None


def test_access_to_what_there_is_not_fails_as_in_transformers(outputs_and_own):
    for outputs in outputs_and_own:
        with pytest.raises(AttributeError, match="nothing"):
            _ = outputs.nothing
        with pytest.raises(KeyError):
            _ = outputs["hidden_states"]
        with pytest.raises(IndexError):
            _ = outputs[2]
        with pytest.raises(Exception, match="You cannot use ``pop``"):
            outputs.pop("loss")


def test_outputs_can_be_set(outputs_and_own):
    outputs, own = outputs_and_own
    outputs.loss = 2 * outputs.loss
    assert outputs["loss"] is outputs.loss is outputs[0]
    outputs["loss"] = outputs.loss / 2
    assert max_difference(outputs.loss, own.loss) < 1e-12
    outputs.logits = own.logits + 1
    assert max_difference(outputs[1], own.logits + 1) == 0
    assert list(outputs) == ["loss", "logits"]


def test_a_cache_is_there_where_the_call_leaves_it_on():
    model = make_model("llama").eval()
    with torch.no_grad():
        outputs = FastPath(DEFAULT_OPTIONS).call(model, (), batch(model, use_cache=None), MAX_TOKENS)
        (cache,) = (outputs[name] for name in CACHE_ARGUMENTS if name in outputs)
        assert cache.get_seq_length() == batch(model)["input_ids"].shape[1]
