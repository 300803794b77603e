"""Scripts that switch a model's adapters for single calls: functions of the call and the model, also a sharded one."""

import copy

import torch
from peft import LoraConfig, get_peft_model

from moreh.planner.plan.plan import Plan
from moreh.runtime.engine.sharded.install import install_sharding_support
from moreh.runtime.engine.sharded.shard_model import shard_model
from tests.helpers.float64 import exact_float64
from tests.helpers.loss_patterns import inputs_of
from tests.helpers.models.families import make_model
from tests.helpers.sharded.cases import weight_difference


def make_adapted():
    """A Llama in float64 with two adapters, whose matrices are all random; "default" trains."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False}
    model = get_peft_model(make_model("llama"), LoraConfig(**settings), autocast_adapter_dtype=False)
    model.add_adapter("other", LoraConfig(**settings), autocast_adapter_dtype=False)
    model.set_adapter("default")
    return model.double()


def _distance(outputs, reference):
    return outputs.loss + (outputs.logits.log_softmax(-1) - reference.logits.log_softmax(-1)).square().mean()


def reference_without_adapter(call, model):
    inputs = inputs_of(model, 0)
    with torch.no_grad(), model.disable_adapter():
        reference = call(**inputs)
    _distance(call(**inputs), reference).backward()


def reference_of_another_adapter(call, model):
    inputs = inputs_of(model, 0)
    model.set_adapter("other")
    with torch.no_grad():
        reference = call(**inputs)
    model.set_adapter("default")
    _distance(call(**inputs), reference).backward()


def base_model_with_gradients_enabled(call, model):
    """No parameter trains in the first call."""
    inputs = inputs_of(model, 0)
    with model.disable_adapter():
        base = call(**inputs)
    assert not base.loss.requires_grad
    _distance(call(**inputs), base).backward()


def scaled_before_backward(call, model):
    losses = [call(**inputs_of(model, step)).loss for step in range(2)]
    layers = [layer for layer in model.modules() if hasattr(layer, "scale_layer")]
    for layer in layers:
        layer.scale_layer(0.5)
    sum(losses).backward()
    for layer in layers:
        layer.unscale_layer(0.5)


SWITCHES = [
    reference_without_adapter,
    reference_of_another_adapter,
    base_model_with_gradients_enabled,
    scaled_before_backward,
]


def compare(plan):
    """For each pattern, the largest difference of a weight from those of a whole model after two steps."""
    install_sharding_support()
    differences = {}
    for pattern in SWITCHES:
        whole = make_adapted()
        sharded = copy.deepcopy(whole)
        with exact_float64():
            runner = shard_model(sharded, Plan(**plan))
            for _ in range(2):
                for model in (whole, sharded):
                    pattern(model, model)
                    torch.optim.SGD(model.parameters(), lr=0.05).step()
                    model.zero_grad()
        differences[pattern.__name__] = weight_difference(runner.model, whole)
    return differences
