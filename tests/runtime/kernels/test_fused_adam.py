"""Optimizers of the script use torch's fused kernels, with the same results."""

import copy

import pytest
import torch

from moreh.runtime.kernels.fused_adam import use_fused_kernels


def train(make, *, fuse):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)).double()
    optimizer = make(model.parameters())
    if fuse:
        use_fused_kernels(optimizer)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 4)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(6, 7, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return optimizer, copy.deepcopy(model.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.01, dtype=torch.float64), weight_decay=0.3),
        lambda parameters: torch.optim.Adam([{"params": list(parameters), "lr": 0.1}], amsgrad=True, maximize=True),
    ],
    ids=["AdamW", "tensor learning rate", "Adam"],
)
def test_fused_kernels_give_the_same_weights(make):
    optimizer, weights = train(make, fuse=True)
    assert all(group["fused"] for group in optimizer.param_groups)
    plain, expected = train(make, fuse=False)
    assert not any(group["fused"] for group in plain.param_groups)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=False),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=False),
        lambda parameters: torch.optim.Adam(parameters, lr=0.01, differentiable=True),
        type("CustomAdamW", (torch.optim.AdamW,), {}),
    ],
    ids=["SGD", "for-loop", "foreach", "not fused", "differentiable", "subclass"],
)
def test_implementation_that_the_script_has_chosen_stays(make):
    optimizer = make([torch.nn.Parameter(torch.ones(2))])
    before = copy.deepcopy(optimizer.defaults)
    use_fused_kernels(optimizer)
    assert optimizer.defaults == before
    assert not any(group.get("fused") for group in optimizer.param_groups)
