"""Functions that compute the total norm of gradients: the first that knows the gradients answers."""

from unittest import mock

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from moreh.patches import total_norm
from moreh.patches.patch import Patch
from moreh.patches.total_norm import PUBLIC_TOTAL_NORM, TOTAL_NORM, on_total_norm

PATCHES = (TOTAL_NORM, PUBLIC_TOTAL_NORM)


@pytest.fixture
def installs(monkeypatch):
    """Nobody has registered; the calls that install a patch."""
    active = [patch for patch in PATCHES if patch.is_active]
    for patch in active:
        patch.uninstall()
    monkeypatch.setattr(total_norm, "_functions", [])
    with mock.patch.object(Patch, "install", autospec=True, side_effect=Patch.install) as install:
        yield install
    for patch in PATCHES:
        patch.uninstall()
    for patch in active:
        patch.install(total_norm._make_total_norm)


def parameter_with_gradient():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    return parameter


def test_patches_are_installed_once_and_the_first_function_that_knows_the_gradients_answers(installs):
    on_total_norm(lambda grads, norm_type: None)
    on_total_norm(lambda grads, norm_type: torch.tensor(10.0))
    on_total_norm(lambda grads, norm_type: torch.tensor(20.0))
    assert [call.args[0] for call in installs.call_args_list] == list(PATCHES)
    parameter = parameter_with_gradient()
    assert torch.nn.utils.get_total_norm([parameter.grad]).item() == 10.0
    # The script has imported this one before anybody registered.
    assert clip_grad_norm_([parameter], 5.0).item() == 10.0
    torch.testing.assert_close(parameter.grad, torch.tensor([1.5, 2.0]))


def test_gradients_that_no_function_knows_have_the_norm_of_torch(installs):
    asked = []
    on_total_norm(lambda grads, norm_type: asked.append((len(grads), norm_type)))
    parameter = parameter_with_gradient()
    assert torch.nn.utils.get_total_norm([parameter.grad]).item() == 5.0
    assert clip_grad_norm_(parameter, 100.0, norm_type=float("inf")).item() == 4.0
    assert asked == [(1, 2.0), (1, float("inf"))]


def test_norm_that_is_not_finite_is_refused_where_the_script_asks_for_it(installs):
    on_total_norm(lambda grads, norm_type: torch.tensor(float("nan")))
    parameter = parameter_with_gradient()
    assert clip_grad_norm_([parameter], 5.0).isnan()
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_([parameter], 5.0, error_if_nonfinite=True)
