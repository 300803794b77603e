"""Models whose weights are in bfloat16, on one device and sharded over workers."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch

from tests.helpers.sharded.cases import compare
from tests.helpers.workers import run_on_workers
from tests.runtime.sharding.test_optimizers import TWO_WORKERS
from utils.config.schema import TrainSection
from utils.training.adamw_in_float32 import AdamWInFloat32
from utils.training.optimizer import make_optimizer

LR = 1e-2


def in_bfloat16(model):
    return model.to(torch.bfloat16)


def compare_in_bfloat16(plan, state_dtype):
    settings = {"steps": 2, "lr": LR, "optimizer_state_dtype": state_dtype, "optimizer_settings": {"eps": 1e-3}}
    return compare("llama", plan, in_bfloat16, precision=nullcontext, settings_of_optimizer=json.dumps(settings))


@pytest.mark.parametrize("state_dtype", ["weights", "float32"])
def test_training_on_two_workers_is_that_of_a_whole_model_to_the_rounding_of_bfloat16(state_dtype):
    cases = [(plan, state_dtype) for plan in TWO_WORKERS.values()]
    for results in run_on_workers(compare_in_bfloat16, cases, size=2):
        for curve, weights in results:
            assert curve < 0.02
            assert 0 < weights < 0.05  # 0 would be float64


def train(optimizer, parameters, steps=30):
    """Gradients of the size of 1 in random order, of which the mean is not 0."""
    torch.manual_seed(0)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = (torch.randn_like(parameter.float()) + 0.1).to(parameter.dtype)
        optimizer.step()


def weights_after(optimizer_class, dtype, **settings):
    torch.manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(64, 32).to(torch.bfloat16).to(dtype))]
    optimizer = optimizer_class(parameters, lr=LR, **settings)
    train(optimizer, parameters)
    return parameters[0].detach().float(), optimizer


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}])
def test_state_in_float32_is_that_of_a_training_in_float32(settings):
    _, exact = weights_after(torch.optim.AdamW, torch.float32, **settings)
    weights, optimizer = weights_after(AdamWInFloat32, torch.bfloat16, **settings)
    (of_float32,), (state,) = exact.state.values(), optimizer.state.values()
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[name].dtype == torch.float32
        # The gradients are in bfloat16, and all sums of them in float32.
        assert (state[name] - of_float32[name]).norm() < 3e-3 * of_float32[name].norm()
    half, plain = weights_after(torch.optim.AdamW, torch.bfloat16, **settings)
    (rounded,) = plain.state.values()
    assert (rounded["exp_avg_sq"].float() - of_float32["exp_avg_sq"]).norm() > 0.01 * of_float32["exp_avg_sq"].norm()
    assert not torch.equal(weights, half)


def test_step_is_one_in_float32_that_is_rounded():
    torch.manual_seed(1)
    start, grad = torch.randn(64, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    ours.grad, theirs.grad = grad, grad.float()
    AdamWInFloat32([ours], lr=LR, weight_decay=0.1).step()
    torch.optim.AdamW([theirs], lr=LR, weight_decay=0.1).step()
    assert torch.equal(ours, theirs.bfloat16())


def test_loaded_state_is_not_rounded():
    _, optimizer = weights_after(AdamWInFloat32, torch.bfloat16)
    (parameter,) = optimizer.param_groups[0]["params"]
    again = torch.nn.Parameter(parameter.detach().clone())
    loaded = AdamWInFloat32([again], lr=LR)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, own in ((optimizer, parameter), (loaded, again)):
        train(each, [own], steps=3)
    assert torch.equal(parameter, again)


def test_settings_choose_the_optimizer_by_the_type_of_the_weights():
    train_section = TrainSection(steps=1, optimizer_state_dtype="float32")
    model = torch.nn.Linear(4, 4)
    assert type(make_optimizer(model, train_section)) is torch.optim.AdamW
    assert type(make_optimizer(model.bfloat16(), train_section)) is AdamWInFloat32
    assert type(make_optimizer(model, TrainSection(steps=1))) is torch.optim.AdamW
