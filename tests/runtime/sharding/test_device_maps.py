"""`from_pretrained(device_map=...)` on several workers: one device is where the model is moved, several are refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from moreh.accelerator.job import local_job
from moreh.errors import AcceleratorError, OptionError
from moreh.runtime.sharding.local_weights import is_lazy_model
from tests.helpers.models.checkpoint_models import build_model, lazy_loading

pytest.importorskip("accelerate", reason="without the line, device_map needs it")


@pytest.fixture
def directory(tmp_path):
    """Of a saved model; from_pretrained loads it as in one of several workers."""
    build_model("llama").save_pretrained(tmp_path)
    with lazy_loading():
        yield tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        {"tp_plan": "auto"},
        {"device_map": {"model": 0, "lm_head": "cpu"}},
        {"device_map": {"": "disk"}},
        {"device_map": "meta"},
        {"device_map": "gpu"},
        {"max_memory": {0: "20GB"}, "device_map": "auto"},
    ],
    ids=str,
)
def test_arguments_that_place_parts_are_refused(directory, arguments):
    name = next(iter(arguments))
    for model_class in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(OptionError, match=rf"given {name}=.*the plan .*Leave {name} out"):
            model_class.from_pretrained(directory, **arguments)


@pytest.mark.parametrize(
    ("device_map", "is_moved"),
    [
        ({"": "cpu"}, False),
        (torch.device("cpu"), False),
        ({"model": "cpu", "lm_head": torch.device("cpu")}, False),
        ("auto", False),  # libraries see no device but the CPU
        ({"": 0}, True),
        ("cuda", True),
        (torch.device("cuda:0"), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_one_device_is_where_the_model_is_moved(directory, model_class, device_map, is_moved):
    """As by `.to(device)`: a lazy model stays in its files, and the accelerator counts it."""
    model = model_class.from_pretrained(directory, device_map=device_map)
    assert is_lazy_model(model) == (model_class is AutoModelForCausalLM)
    assert local_job().ledger.holds(next(model.parameters())) == is_moved


def test_second_device_is_refused(directory):
    with pytest.raises(AcceleratorError, match="no device cuda:1"):
        AutoModelForCausalLM.from_pretrained(directory, device_map={"": 1})
