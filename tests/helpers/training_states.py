"""Trainings of a tiny GPT-2 by one process, and what a rank has of them, for the tests of their checkpoints."""

import dataclasses

import torch
from torch import nn

from moreh.runtime.checkpoint.dcp_io import save_state_async
from moreh.runtime.checkpoint.training_state import collect_training_state, load_training_state, unsharded_specs
from moreh.runtime.sharding.global_layout import GlobalLayout
from moreh.runtime.sharding.global_tensor import GlobalTensor, local_part
from moreh.runtime.sharding.local_weights import materialize_local_shards
from tests.helpers.models.checkpoint_models import build_model, specs_of

FAMILY = "gpt2"
EXTRA = {
    "step": 7,
    "scheduler": {"last_epoch": 3, "betas": (0.9, 0.95)},
    "random": torch.arange(5, dtype=torch.uint8),
    "note": "ä",
}


def train(optimizer_class=torch.optim.AdamW, seed=0, steps=2, **settings):
    """A model with an optimizer of two groups. One parameter is frozen, one has no gradient."""
    model = build_model(FAMILY)
    parameters = dict(model.named_parameters())
    frozen, idle = "transformer.h.0.ln_1.weight", "transformer.h.1.ln_2.bias"
    parameters[frozen].requires_grad_(False)
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "lr": 0.01},
        {"params": [p for name, p in parameters.items() if p.dim() == 1 and name != frozen], "lr": 0.02},
    ]
    optimizer = optimizer_class(groups, **settings)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for name, parameter in parameters.items():
            if parameter.requires_grad and name != idle:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
    return model, optimizer


def optimizer_state_by_name(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: dict(values) for parameter, values in optimizer.state.items()}


def shard_training(model, optimizer, grid, as_global=False):
    """A rank's part of a training: specs, local tensors, parameters, an optimizer with its state, and the mesh.

    With `as_global`, parameters and state that data-parallel ranks shard are global tensors.
    """
    mesh = grid.mesh()
    specs = specs_of(model, grid)
    local_tensors = materialize_local_shards(model, specs, mesh)

    def as_seen(name, local):
        if not as_global or specs[name].fsdp_dim is None:
            return local
        return GlobalTensor(local, GlobalLayout(specs[name], mesh))

    parameters = {name: nn.Parameter(as_seen(name, local)) for name, local in local_tensors.items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        group | {"params": [parameters[names[id(p)]] for p in group["params"] if names[id(p)] in parameters]}
        for group in optimizer.param_groups
    ]
    sharded_optimizer = type(optimizer)(
        [group | {"params": group["params"] or [nn.Parameter(torch.empty(0))]} for group in groups], lr=1.0
    )
    for name, values in optimizer_state_by_name(model, optimizer).items():
        if name in parameters:
            sharded = {}
            for key, value in values.items():
                sharded[key] = as_seen(name, shard_like(specs[name], value, mesh)) if value.dim() else value.clone()
            sharded_optimizer.state[parameters[name]] = sharded
    return specs, local_tensors, parameters, sharded_optimizer, mesh


def shard_like(spec, tensor, mesh):
    """A rank's shard of a tensor that is sharded as a parameter is."""
    module = nn.Module()
    module.state = nn.Parameter(tensor)
    return materialize_local_shards(module, {"state": dataclasses.replace(spec, dtype=tensor.dtype)}, mesh)["state"]


def assert_same_state(actual, expected):
    """Compare optimizers' states by parameter and key: types, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, values in actual.items():
        assert values.keys() == expected[name].keys()
        for key, value in values.items():
            other = expected[name][key]
            assert type(other) is type(value)
            if isinstance(value, torch.Tensor):
                assert other.dtype == value.dtype
                assert torch.equal(local_part(other), local_part(value))
            else:
                assert other == value


def save_alone(directory, optimizer_class=torch.optim.AdamW, extra=EXTRA, **settings):
    """Train in this process and save."""
    model, optimizer = train(optimizer_class, **settings)
    local_tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters())
    state = collect_training_state(unsharded_specs(model), local_tensors, [optimizer], parameters, None, extra)
    save_state_async(state, directory, None).result()


def load_alone(directory, model, optimizers):
    """Load into a model and optimizers of this process; returns `extra`."""
    local_tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters())
    return load_training_state(directory, unsharded_specs(model), local_tensors, optimizers, parameters, None)


def resume_alone(directory):
    """Load what `train` trained into this process, compare everything, and go on; returns `extra`."""
    model, optimizer = train(seed=9, steps=0)
    extra = load_alone(directory, model, [optimizer])
    expected_model, expected_optimizer = train()
    assert all(torch.equal(tensor, expected_model.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert_same_state(
        optimizer_state_by_name(model, optimizer), optimizer_state_by_name(expected_model, expected_optimizer)
    )
    assert [{**group, "params": 0} for group in optimizer.param_groups] == [
        {**group, "params": 0} for group in expected_optimizer.param_groups
    ]
    for trained_model, trained_optimizer in ((model, optimizer), (expected_model, expected_optimizer)):
        for parameter in trained_model.parameters():
            parameter.grad = torch.ones_like(parameter)
        trained_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected_model.parameters(), strict=True))
    return extra
