"""Optimizer state that the planner predicts, against the state of real optimizers."""

from dataclasses import replace

import pytest
import torch

from moreh.models.describe.from_module import describe_module
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.cost.prediction import predict
from moreh.planner.hardware.cluster import cluster_for_flavor
from moreh.planner.hardware.environment import make_environment
from moreh.planner.optimizer_state import ADAMW, optimizer_state
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.software_profile import TRANSFORMERS, moreh_software
from moreh.runtime.engine import optimizer_in_use
from tests.helpers.models.families import make_model
from utils.config.optimizers import OPTIMIZERS
from utils.config.schema import TrainSection
from utils.training.optimizer import make_optimizer

SETTINGS = {"adamw": {"amsgrad": True}, "sgd": {"momentum": 0.9}, "rmsprop": {"centered": True}}


def trained(family, name, settings):
    """A model after a step, and its optimizer."""
    model = make_model(family)
    optimizer = make_optimizer(model, TrainSection(steps=1, optimizer=name, optimizer_settings=settings))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def optimizer_bytes(model, state, plan=None):
    architecture = describe_module(model)
    plan = plan or Plan((len(architecture.layers),), micro_batch_size=2)
    training = Training(architecture, plan.global_batch_size, 16, state)
    memory = peak_memory(PlanTable.from_plans([plan]), training, replace(TRANSFORMERS, reuses_memory=False))
    return memory.optimizer.sum()


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_has_the_predicted_size(family, name):
    settings = SETTINGS.get(name, {})
    model, optimizer = trained(family, name, settings)
    actual = sum(value.nbytes for values in optimizer.state.values() for value in values.values() if value.dim())
    predicted = optimizer_bytes(model, optimizer_state(name, settings))
    if name == "adafactor":
        assert predicted == 0
    else:
        weight_bytes = 4 if next(model.parameters()).dtype == torch.float32 else 8
        assert predicted == pytest.approx(actual * 4 / weight_bytes)


def test_state_is_shared_by_the_ranks_that_shard_it():
    model = make_model("llama")
    layers = len(describe_module(model).layers)
    whole, shared = (
        optimizer_bytes(model, optimizer_state("muon", {}), Plan((layers,), data=2, sharding=sharding))
        for sharding in ("none", "optimizer")
    )
    assert shared == pytest.approx(whole / 2)


def test_less_state_takes_less_memory_and_time(eight_gcds_training):
    training, environment, plan = eight_gcds_training
    adamw, sgd, muon = (
        predict(plan, replace(training, optimizer=optimizer_state(name, {})), environment)
        for name in ("adamw", "sgd", "muon")
    )
    trainable = training.architecture.trainable_parameters
    assert adamw.memory[0].optimizer - sgd.memory[0].optimizer == pytest.approx(8 * trainable / plan.data)
    assert sgd.parts.optimizer_s < adamw.parts.optimizer_s < muon.parts.optimizer_s
    assert sgd.memory_bytes < muon.memory_bytes < adamw.memory_bytes


@pytest.fixture
def eight_gcds_training():
    from moreh.accelerator.this_machine import find_model
    from moreh.models.describe.from_source import describe
    from tests.conftest import ROOT

    architecture = describe(ROOT / "configs" / "models" / "gpt2.json")
    plan = Plan((len(architecture.layers),), data=8, micro_batch_size=2, sharding="parameters")
    environment = make_environment(cluster_for_flavor(find_model("xLarge.512GB")), moreh_software("half"))
    return Training(architecture, 16, 1024), environment, plan


def test_optimizer_of_a_script_is_found(monkeypatch):
    model, other = make_model("llama"), make_model("llama")
    made = []
    monkeypatch.setattr(optimizer_in_use, "existing_optimizers", lambda: made)

    def found():
        return optimizer_in_use.optimizer_in_use(model)

    assert found() == ADAMW
    made.append(torch.optim.SGD(other.parameters()))
    assert found() == ADAMW  # of another model
    made.append(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9))
    assert found() == optimizer_state("sgd", {"momentum": 0.9})
    made[-1] = torch.optim.SGD(model.parameters(), lr=1.0)
    assert found() == optimizer_state("sgd", {})

    class Own(torch.optim.Optimizer):
        pass

    made[-1] = Own(model.parameters(), {})
    assert found() == ADAMW  # unknown, so the usual two values

    combined = make_optimizer(model, TrainSection(steps=1, optimizer="muon"))
    made[-1:] = [combined, *combined._optimizers]
    assert found() == optimizer_state("muon", {})
