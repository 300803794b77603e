"""What a call gives is that of its own adapters, whichever the script has switched to when it is computed."""

import pytest

from moreh.errors import OptionError
from moreh.models.adapters import AdapterState
from tests.helpers.compare import worst
from tests.helpers.loss_patterns import Calls, inputs_of, worst_difference
from tests.helpers.models.families import make_model
from tests.helpers.sharded.adapter_switches import SWITCHES, compare, make_adapted, reference_without_adapter
from tests.helpers.workers import run_on_workers
from tests.runtime.engine.calls.test_own_losses import PLANS


@pytest.mark.parametrize("pattern", SWITCHES, ids=lambda pattern: pattern.__name__)
def test_gradients_are_those_of_plain_torch(pattern):
    assert worst_difference(pattern, make_adapted()) < 1e-9


def test_comparison_finds_the_adapters_of_now(monkeypatch):
    monkeypatch.setattr(AdapterState, "__init__", lambda self, root: setattr(self, "_layers", []))
    assert worst_difference(reference_without_adapter, make_adapted()) > 1e-3


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
