"""Weights that a script changes through an alias between a call and the use of its outputs."""

import pytest

from moreh.errors import OptionError
from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.engine.fast_path import FastPath
from tests.helpers.fast_path_cases import MAX_TOKENS, batch
from tests.helpers.models.families import make_model


def change_data(model, factor):
    for parameter in model.parameters():
        parameter.data.mul_(factor)


def assign_data(model, factor):
    for parameter in model.parameters():
        parameter.data = parameter.data * factor


def change_arrays(model, factor):
    for parameter in model.parameters():
        array = parameter.detach().numpy()
        array *= factor


@pytest.mark.parametrize("change", [change_data, assign_data, change_arrays])
def test_weights_changed_through_an_alias_are_noticed(change):
    model = make_model("llama")
    fast_path = FastPath(DEFAULT_OPTIONS)
    outputs, later, last = (fast_path.call(model, (), batch(model), MAX_TOKENS) for _ in range(3))
    change(model, 2)
    with pytest.raises(OptionError, match="before the optimizer's step"):
        _ = outputs.logits
    with pytest.raises(OptionError, match="before the change"):
        later.loss.backward()
    change(model, 1 / 2)
    assert last.logits is not None
    later.loss.backward()


def test_loss_is_printed_as_the_models_own():
    model = make_model("llama").float()
    loss = FastPath(DEFAULT_OPTIONS).call(model, (), batch(model), MAX_TOKENS).loss
    assert repr(loss) == repr(model(**batch(model)).loss)
