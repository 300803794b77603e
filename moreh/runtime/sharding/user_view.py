"""The script's view of sharded parameters and gradients: whole tensors."""

import torch
from torch import nn

from moreh.runtime.sharding.global_layout import GlobalLayout, is_whole_on_every_rank
from moreh.runtime.sharding.global_tensor import GlobalTensor
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.spec import ParamSpec


def user_param(local: torch.Tensor | None, spec: ParamSpec, mesh: Mesh, original: nn.Parameter) -> nn.Parameter:
    """The parameter that the script sees. It shares memory with `local`, this rank's part; None if it has none.

    A parameter that every rank has whole is the original, unless the original had no data. The rank computes with
    another object, so hooks of the script see no partial gradients.
    """
    if is_whole_on_every_rank(spec, mesh):
        assert local is not None
        if original.device != local.device:
            return nn.Parameter(local, original.requires_grad)
        original.data = local
        return original
    layout = GlobalLayout(spec, mesh)
    if local is None:
        local = torch.empty(layout.local_shape, dtype=spec.dtype, device=mesh.device)
    parameter = nn.Parameter(GlobalTensor(local, layout), original.requires_grad)
    # Set at once: the hash depends on it, which must not change while the parameter is a key.
    parameter.__dict__["_moreh_original"] = original
    return parameter


def as_user_grad(local: torch.Tensor | None, parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of a parameter's gradient, None if it has none, as the script sees it; not a copy."""
    user: torch.Tensor = parameter
    if not isinstance(user, GlobalTensor):
        assert local is not None
        return local
    return GlobalTensor(user.local.new_empty(user.local.shape) if local is None else local, user.global_layout)
