"""Functions that see every optimizer: each function sees each optimizer once, through one patch."""

import gc
import weakref
from unittest import mock

import pytest
import torch

from moreh.patches import optimizer_creation
from moreh.patches.optimizer_creation import (
    OPTIMIZER_CREATION,
    existing_optimizers,
    on_optimizer_created,
    revisit_optimizers,
)
from moreh.patches.patch import Patch


@pytest.fixture
def installs(monkeypatch):
    """Nobody has registered; the calls that install a patch."""
    was_active = OPTIMIZER_CREATION.is_active
    if was_active:
        OPTIMIZER_CREATION.uninstall()
    monkeypatch.setattr(optimizer_creation, "_callbacks", [])
    monkeypatch.setattr(optimizer_creation, "_optimizers", weakref.WeakSet())
    with mock.patch.object(Patch, "install", autospec=True, side_effect=Patch.install) as install:
        yield install
    OPTIMIZER_CREATION.uninstall()
    if was_active:
        OPTIMIZER_CREATION.install(optimizer_creation._make_init)


def make_optimizer():
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])


def test_patch_is_installed_once_and_each_function_sees_each_optimizer_once(installs):
    seen = [[], [], []]
    for optimizers in seen:
        on_optimizer_created(optimizers.append)
    assert installs.call_count == 1
    first, second = make_optimizer(), make_optimizer()
    assert seen == [[first, second]] * 3


def test_optimizers_are_known_while_they_live(installs):
    early = make_optimizer()
    on_optimizer_created(lambda optimizer: None)
    late = make_optimizer()
    assert existing_optimizers() == [late]
    assert early is not late
    del late
    gc.collect()
    assert existing_optimizers() == []


def test_revisiting_shows_each_optimizer_again(installs):
    seen = []
    on_optimizer_created(seen.append)
    optimizer = make_optimizer()
    revisit_optimizers()
    assert seen == [optimizer, optimizer]


def test_error_of_a_function_is_raised_where_the_optimizer_is_made(installs):
    def refuse(optimizer):
        raise ValueError(type(optimizer).__name__)

    on_optimizer_created(refuse)
    with pytest.raises(ValueError, match="AdamW"):
        make_optimizer()
