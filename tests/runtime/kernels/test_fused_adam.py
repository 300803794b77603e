"""Optimizers of the script use torch's fused kernels, with the same results."""

import contextlib
import copy
import gc
import pickle
import weakref
from unittest import mock

import pytest
import torch

from moreh.runtime.kernels.fused_adam import use_fused_kernels
from tests.helpers.compare import worst


@contextlib.contextmanager
def fused_calls():
    """A list that gets an entry for each call of torch's fused kernels."""
    calls = []

    def count(kernel):
        return lambda *args, **kwargs: (calls.append(kernel), kernel(*args, **kwargs))

    names = ("_fused_adam_", "_fused_adamw_")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch, name, count(getattr(torch, name))))
        yield calls


def settings(optimizer):
    return [{key: str(value) for key, value in g.items() if key != "params"} for g in optimizer.param_groups]


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
    with fused_calls() as calls:
        optimizer, weights = train(make, fuse=True)
        assert len(calls) == 4
        plain, expected = train(make, fuse=False)
        assert len(calls) == 4
    assert settings(optimizer) == settings(plain)
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


def permuted_gradient(parameter):
    parameter.grad = torch.randn(6, 3).t()


def expanded_gradient(parameter):
    parameter.grad = torch.randn(3, 1).expand(3, 6)


def itself_as_gradient(parameter):
    parameter.grad = parameter.detach()


def usual_gradient(parameter):
    parameter.grad = torch.randn(3, 6)


def usual_parameter():
    return torch.randn(3, 6)


# Each parameter is a view of a larger tensor, whose other elements must stay as they are.
LAYOUTS = {
    "autograd.grad": (usual_parameter, permuted_gradient),
    "expanded gradient": (usual_parameter, expanded_gradient),
    "gradient is parameter": (usual_parameter, itself_as_gradient),
    "transposed parameter": (lambda: torch.randn(6, 3).t(), usual_gradient),
    "sliced parameter": (lambda: torch.randn(3, 12)[:, ::2], usual_gradient),
}


def train_layout(make_parameter, set_gradient, *, fuse, closure=False):
    """Two groups, the second one with usual strides; the storages of all tensors after three steps."""
    torch.manual_seed(0)
    odd, usual = torch.nn.Parameter(make_parameter()), torch.nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([{"params": [odd]}, {"params": [usual]}], lr=0.1, weight_decay=0.2)
    if fuse:
        use_fused_kernels(optimizer)

    def compute():
        set_gradient(odd)
        usual.grad = torch.randn(4)
        return 0.0

    for _ in range(3):
        if closure:
            optimizer.step(compute)
        else:
            compute()
            optimizer.step()
    tensors = [odd, usual, *(optimizer.state[odd][key] for key in ("exp_avg", "exp_avg_sq"))]
    return [
        torch.tensor(tensor.untyped_storage().tolist(), dtype=torch.uint8).view(torch.float32) for tensor in tensors
    ]


@pytest.mark.parametrize("closure", [False, True], ids=["step", "closure"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_differ_give_the_results_of_plain_torch(layout, closure):
    with fused_calls() as calls:
        actual = train_layout(*LAYOUTS[layout], fuse=True, closure=closure)
    expected = train_layout(*LAYOUTS[layout], fuse=False, closure=closure)
    assert worst((a - e).abs().max() for a, e in zip(actual, expected, strict=True)) < 1e-6
    assert len(calls) == 3, "the other group has usual strides"


def test_layout_that_all_tensors_share_is_fused():
    def image_kernel():
        return torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)

    def gradient(parameter):
        parameter.grad = torch.randn_like(parameter)

    with fused_calls() as calls:
        actual = train_layout(image_kernel, gradient, fuse=True)
    assert len(calls) == 6
    expected = train_layout(image_kernel, gradient, fuse=False)
    assert worst((a - e).abs().max() for a, e in zip(actual, expected, strict=True)) < 1e-6


def test_state_of_another_layout_is_not_fused():
    results = []
    for fuse in (True, False):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(6, 3).t())
        optimizer = torch.optim.Adam([weight], lr=0.1)
        if fuse:
            use_fused_kernels(optimizer)
        weight.grad = torch.randn(6, 3).t()
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][0] = {key: value.clone().contiguous() for key, value in saved["state"][0].items()}
        optimizer.load_state_dict(saved)
        optimizer.step()
        results.append(weight.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_step_that_leaves_the_fused_kernels_is_logged_once(caplog):
    with caplog.at_level("INFO", logger="moreh"):
        train_layout(*LAYOUTS["autograd.grad"], fuse=True)
    assert [record.getMessage()[:28] for record in caplog.records] == ["AdamW uses torch's default k"]


def test_optimizer_shows_nothing_of_the_kernels():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    use_fused_kernels(optimizer)
    use_fused_kernels(optimizer)  # as for parameters that were exchanged
    weight.grad = torch.ones(2)
    optimizer.step()
    for seen in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert seen.defaults["fused"] is None
        assert seen.state_dict()["param_groups"][0]["fused"] is None
    with mock.patch.object(torch, "_fused_adamw_", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.param_groups[0]["fused"] is None


def test_dropped_optimizer_is_freed_at_once():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    use_fused_kernels(optimizer)
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()
