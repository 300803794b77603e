"""Whole tensors of which a rank holds a part, on one rank."""

import pytest
import torch

from moreh.runtime.kernels.fused_adam import use_fused_kernels
from moreh.runtime.sharding.global_layout import GlobalLayout
from moreh.runtime.sharding.global_tensor import GlobalTensor
from moreh.runtime.sharding.mesh import single_rank_mesh
from moreh.runtime.sharding.spec import ParamSpec
from moreh.storages import shares_storage, storage_address, storage_of
from tests.helpers.compare import max_difference

MESH = single_rank_mesh(torch.device("cpu"))


def global_tensor(local):
    return GlobalTensor(local, GlobalLayout(ParamSpec("weight", tuple(local.shape), local.dtype, (0,)), MESH))


def test_storage_is_that_of_the_local_part():
    local = torch.randn(4, 3)
    tensor = global_tensor(local)
    assert storage_address(storage_of(tensor)) == storage_address(local.untyped_storage())
    assert shares_storage(tensor, tensor.detach())
    assert not shares_storage(tensor, tensor.clone())


def test_view_has_no_storage():
    assert storage_of(global_tensor(torch.randn(4, 3))[1]) is None


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_fused_kernels_compute_on_local_parts_where_they_lie_alike(kind, monkeypatch):
    """A gradient of other strides than its parameter is updated right too, by torch's own kernels."""
    start, fused = torch.randn(4, 3), []
    name = "_fused_adamw_" if kind is torch.optim.AdamW else "_fused_adam_"
    original = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *args, **kwargs: (fused.append(1), original(*args, **kwargs))[1])
    for grad in (torch.randn(4, 3), torch.randn(3, 4).t()):
        plain = torch.nn.Parameter(start.clone())
        plain.grad = grad.clone()
        kind([plain], lr=0.1, foreach=False).step()
        fused.clear()
        parameter = torch.nn.Parameter(global_tensor(start.clone()))
        parameter.grad = global_tensor(grad)
        optimizer = kind([parameter], lr=0.1)
        use_fused_kernels(optimizer)
        optimizer.step()
        assert bool(fused) == grad.is_contiguous()
        assert max_difference(parameter.detach().local, plain.detach()) < 1e-6
