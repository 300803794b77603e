"""What a call gives is that of its own adapters, whichever the script has switched to when it is computed."""

import copy

import pytest
import torch

from moreh.errors import OptionError
from moreh.models.adapters import AdapterState
from tests.helpers.compare import worst, worst_of_names
from tests.helpers.fast_path_cases import gradients
from tests.helpers.float64 import exact_float64
from tests.helpers.loss_patterns import Calls, inputs_of
from tests.helpers.models.families import make_model
from tests.helpers.sharded.adapter_switches import SWITCHES, compare, make_adapted, reference_without_adapter
from tests.helpers.workers import run_on_workers
from tests.runtime.engine.calls.test_own_losses import PLANS


def difference(pattern):
    """The largest relative difference of a gradient between the fast path and plain torch over three steps."""
    plain = make_adapted()
    model = copy.deepcopy(plain)
    calls = Calls(model)
    differences = []
    with exact_float64():
        for _ in range(3):
            pattern(calls, model)
            pattern(plain, plain)
            actual, expected = gradients(model), gradients(plain)
            floor = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())
            differences.append(worst_of_names(actual, expected, floor=floor))
            for each in (model, plain):
                torch.optim.SGD(each.parameters(), lr=0.05).step()
                each.zero_grad()
    assert calls.fast > 0
    return worst(differences)


@pytest.mark.parametrize("pattern", SWITCHES, ids=lambda pattern: pattern.__name__)
def test_gradients_are_those_of_plain_torch(pattern):
    assert difference(pattern) < 1e-9


def test_comparison_finds_the_adapters_of_now(monkeypatch):
    monkeypatch.setattr(AdapterState, "__init__", lambda self, root: setattr(self, "_layers", []))
    assert difference(reference_without_adapter) > 1e-3


@pytest.mark.parametrize("plan", ["pp-tp", "pp-sharded"])
def test_gradients_on_several_workers(plan):
    for differences in run_on_workers(compare, [(PLANS[plan],)], size=4)[0]:
        assert worst(differences.values()) < 1e-9, differences


def test_hooks_of_later_are_no_part_of_a_call():
    model = make_model("llama")
    calls = Calls(model)
    outputs = calls(**inputs_of(model, 0))
    losses = [outputs.loss, calls(**inputs_of(model, 1)).loss]
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(OptionError, match="hooks of the model have changed"):
        sum(losses).backward()
    with pytest.raises(OptionError, match="the model or its inputs have changed"):
        _ = outputs.logits
    hook.remove()
    assert outputs.logits is not None
