"""The optimizer that the settings name: torch's own, with the right parameters, settings and weight decay."""

import inspect

import pytest
import torch

from moreh.planner.optimizer_state import OPTIMIZER_STATES, optimizer_state
from utils.config.optimizers import ADAMW_BESIDE_MUON, OPTIMIZERS
from utils.config.schema import TrainSection
from utils.config.yaml_file import load_config
from utils.errors import UserError
from utils.training.optimizer import make_optimizer

# Of torch's arguments: what other keys say, and what concerns the implementation, not the result.
ELSEWHERE = {"self", "params", "lr", "weight_decay"}
IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable", "maximize"}


def section(name="adamw", **keys):
    return TrainSection(steps=4, optimizer=name, lr=1e-2, weight_decay=0.5, **keys)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_are_those_of_torchs_signature(name):
    kind = OPTIMIZERS[name]
    arguments = inspect.signature(getattr(torch.optim, kind.class_name)).parameters.keys()
    assert arguments - ELSEWHERE - IMPLEMENTATION == kind.settings.keys()


def test_keys_of_the_settings_and_of_the_planner_are_the_same():
    assert OPTIMIZERS.keys() < OPTIMIZER_STATES.keys()
    assert set(TrainSection.model_fields["optimizer"].annotation.__args__) == OPTIMIZERS.keys()


def steps(model, optimizer):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(actual, expected):
    return all(torch.equal(actual[name], expected[name]) for name in expected)


PLAIN = {
    "adamw": ({"betas": [0.8, 0.9], "amsgrad": True}, {"betas": (0.8, 0.9), "amsgrad": True}),
    "sgd": ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
    "adafactor": ({"eps": [None, 1e-2], "d": 2}, {"eps": (None, 1e-2), "d": 2}),
}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
def test_optimizer_is_torchs_own(make_gpt2, name):
    given, plain = PLAIN.get(name, ({}, {}))
    model, other = make_gpt2(), make_gpt2()
    optimizer = make_optimizer(model, section(name, optimizer_settings=given))
    expected = getattr(torch.optim, OPTIMIZERS[name].class_name)(other.parameters(), lr=1e-2, weight_decay=0.5, **plain)
    assert type(optimizer) is type(expected)
    assert same(steps(model, optimizer), steps(other, expected))


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(make_gpt2):
    lines = []
    model, other = make_gpt2(), make_gpt2()
    settings = {"momentum": 0.9, "adamw": {"lr": 1e-3, "betas": [0.8, 0.9]}}
    optimizer = make_optimizer(model, section("muon", optimizer_settings=settings), lines.append)
    matrices = [p for name, p in other.named_parameters() if ".h." in name and p.dim() == 2]
    others = [p for name, p in other.named_parameters() if ".h." not in name or p.dim() == 1]
    assert len(matrices) == 8
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.5, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.5, betas=(0.8, 0.9))
    expected = torch.optim.Optimizer(matrices, {})
    expected.step = lambda: (muon.step(), adamw.step())
    assert same(steps(model, optimizer), steps(other, expected))
    assert lines == [
        "Muon updates 8 (24,576 values) matrices of the layers, AdamW the other 20 (4,992 values) parameters"
    ]
    # A scheduler and a checkpoint reach the groups and the state of both.
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for inner in optimizer._optimizers for group in inner.param_groups] == [5e-3, 5e-4]
    assert len(optimizer.state) == 28
    assert all(inner.state is optimizer.state for inner in optimizer._optimizers)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_norms_and_biases_do_not_decay_by_choice(make_gpt2, name):
    decayed = make_optimizer(make_gpt2(), section(name))
    assert {group["weight_decay"] for group in decayed.param_groups} == {0.5}
    model = make_gpt2()
    optimizer = make_optimizer(model, section(name, decay_norms_and_biases=False))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert kept == {name for name in names.values() if name.endswith("bias") or ".ln_" in name}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.optimizer=lion"], "command line: train.optimizer: 'lion' is not allowed: input should be 'adamw', "),
        (
            ["train.optimizer_settings={momentum: 0.9}"],
            "command line: train.optimizer_settings.momentum: adamw has no such setting. "
            "Allowed here: betas, eps, amsgrad",
        ),
        (
            ["train.optimizer=sgd", "train.optimizer_settings.momentun=0.9"],
            "command line: train.optimizer_settings.momentun: sgd has no such setting; did you mean momentum? "
            "Allowed here: momentum, dampening, nesterov",
        ),
        (
            ["train.optimizer_settings.betas=[0.9, 1.5]"],
            "command line: train.optimizer_settings.betas: [0.9, 1.5] is not allowed: input should be less than 1",
        ),
        (
            ["train.optimizer=muon", "train.optimizer_settings={adamw: {momentum: 1}}"],
            "the adamw beside muon has no such setting. Allowed here: betas, eps, amsgrad, lr",
        ),
        (
            ["train.optimizer=muon", "train.optimizer_settings={adjust_lr_fn: no}"],
            "'no' is not allowed: choose one of original, match_rms_adamw",
        ),
        (["train.decay_steps=2"], "decay_steps and decay_shape are of the schedule wsd, and schedule is cosine"),
        (
            ["train.schedule=wsd", "train.warmup_steps=3", "train.decay_steps=2"],
            "warmup_steps is 3 and decay_steps is 2, but there are only 4 steps",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_line(tiny_config, overrides, message):
    with pytest.raises(UserError) as error:
        load_config(str(tiny_config), overrides)
    (problem,) = error.value.problems
    assert message in problem


def test_line_of_a_wrong_setting_in_a_file_is_named(tiny_config):
    text = tiny_config.read_text(encoding="utf-8")
    tiny_config.write_text(text.replace("lr: 1.0e-3}", "lr: 1.0e-3,\n  optimizer_settings: {beta: [0.9, 0.9]}}"))
    with pytest.raises(UserError, match=r"tiny.yaml:10: train.optimizer_settings.beta: adamw has no such setting"):
        load_config(str(tiny_config), [])


def test_what_torch_refuses_is_one_line(make_gpt2):
    with pytest.raises(UserError, match=r"^train.optimizer_settings: sgd: Nesterov momentum requires a momentum"):
        make_optimizer(make_gpt2(), section("sgd", optimizer_settings={"nesterov": True}))
    with pytest.raises(UserError, match=r"^train.optimizer=muon: Linear has no list of layers"):
        make_optimizer(torch.nn.Linear(2, 2), section("muon"))


def test_adamw_beside_muon_has_the_settings_of_adamw():
    assert ADAMW_BESIDE_MUON.keys() == OPTIMIZERS["adamw"].settings.keys() | {"lr"}


STATEFUL = {"sgd": {"momentum": 0.9}, "rmsprop": {"momentum": 0.5, "centered": True}, "adam": {"amsgrad": True}}


@pytest.mark.parametrize("settings", [{}, STATEFUL])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_planner_knows_how_many_values_are_kept(make_gpt2, name, settings):
    model = make_gpt2()
    own = settings.get(name, {})
    optimizer = make_optimizer(model, section(name, optimizer_settings=own))
    steps(model, optimizer)
    state = optimizer_state(name, own)
    for parameter_name, parameter in model.named_parameters():
        kept = sum(value.numel() for value in optimizer.state[parameter].values() if value.dim())
        is_matrix = ".h." in parameter_name and parameter.dim() == 2
        values = state.matrix_values if is_matrix and state.matrix_values is not None else state.values
        if name == "adafactor":
            assert kept < 0.2 * parameter.numel() or parameter.dim() == 1
        else:
            assert kept == values * parameter.numel()
