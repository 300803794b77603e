"""An optimizer's state under the names of its parameters: what it keeps of each of them, and its groups' settings."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moreh.errors import MorehError
from moreh.runtime.checkpoint.dcp_tensors import StoredTensor, stored_part, stored_value, stored_whole, value_of
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import local_shape
from moreh.runtime.sharding.spec import ParamSpec

# Marks what is no tensor, such as a count of steps.
_VALUE = "value:"


class CheckpointError(MorehError, RuntimeError):
    """A training cannot be saved under its plan, or a checkpoint does not fit the training that is to be resumed."""


def _is_divided(layout: ParamSpec, mesh: Mesh | None) -> bool:
    if mesh is None:
        return False
    over_tensor = layout.division is not None and mesh.size("tensor") > 1
    return over_tensor or (layout.data_dim is not None and mesh.size("data") > 1)


def _refusal(optimizer: str, name: str, key: str, size: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{optimizer} keeps '{key}' of {name} as a tensor {list(size)}, which cannot be cut as the parameter is. While "
        "parameters are divided over workers, checkpoints of a training need an optimizer whose state has the parameters' "
        "shapes, such as AdamW; or train without tensor parallelism and sharding (pipeline and data parallelism may stay)."
    )


def optimizer_state_to_save(
    optimizer: Optimizer, names: Mapping[int, str], layouts: Mapping[str, ParamSpec], mesh: Mesh | None
) -> dict[str, StoredTensor]:
    """What this rank has of the optimizer's state, by "parameter/key". `names` are the parameters' by their ids.

    Raises:
        CheckpointError: there is state for a parameter without a name, or it cannot be cut as its parameter is.
    """
    kind = type(optimizer).__name__
    stored: dict[str, StoredTensor] = {}
    for parameter, values in optimizer.state.items():
        name = names.get(id(parameter))
        if name is None:
            raise CheckpointError(
                f"{kind} has state of a parameter {list(parameter.shape)} that is none of the model's. Give it an optimizer of "
                "its own and save that with torch.save."
            )
        layout = layouts[name]
        for key, value in values.items():
            if not isinstance(value, torch.Tensor):
                stored[f"{name}/{_VALUE}{key}"] = stored_value(value, f"'{key}' of {name} in {kind}")
                continue
            local = (value.to_local() if isinstance(value, DTensor) else value).detach()
            if value.shape == parameter.shape and local.shape == local_shape(layout, mesh):
                stored[f"{name}/{key}"] = stored_part(layout, local, mesh)
            elif value.dim() == 0 or not _is_divided(layout, mesh):
                stored[f"{name}/{key}"] = stored_whole(local)
            else:
                raise _refusal(kind, name, key, tuple(value.shape))
    return stored


def groups_of(optimizer: Optimizer, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """The groups: their settings, and the names of the parameters that this rank knows."""
    return [
        {
            "settings": {key: value for key, value in group.items() if key != "params"},
            "names": [names[id(parameter)] for parameter in group["params"] if id(parameter) in names],
        }
        for group in optimizer.param_groups
    ]


def check_groups(optimizer: Optimizer, names: Mapping[int, str], saved: list[dict[str, Any]]) -> None:
    """Raise CheckpointError unless the parameters are in the groups that they were saved in."""
    kind, groups = type(optimizer).__name__, groups_of(optimizer, names)
    if len(groups) != len(saved):
        raise CheckpointError(
            f"{kind} has {len(groups)} parameter groups, the checkpoint has {len(saved)}. Make the optimizer as in the "
            "training that wrote the checkpoint."
        )
    for number, (group, other) in enumerate(zip(groups, saved, strict=True)):
        different = set(group["names"]) - set(other["names"])
        if different:
            raise CheckpointError(
                f"Parameters of group {number} of {kind} were not in it when the checkpoint was written: "
                f"{', '.join(sorted(different)[:5])}. Make the optimizer's groups as in the training that wrote it."
            )


def state_to_fill(
    optimizer: Optimizer,
    names: Mapping[int, str],
    layouts: Mapping[str, ParamSpec],
    saved: Mapping[str, Mapping[str, TensorStorageMetadata]],
    mesh: Mesh | None,
) -> dict[str, tuple[StoredTensor, torch.Tensor]]:
    """Empty tensors for what was saved of this rank's parameters, by "parameter/key", as they are stored and as they are.

    `saved` is what there is of each parameter, by its keys.

    Raises:
        CheckpointError: saved state cannot be cut as the parameter is here.
    """
    filled: dict[str, tuple[StoredTensor, torch.Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None or parameter.is_meta:
                continue
            layout = layouts[name]
            for key, kind in saved.get(name, {}).items():
                size, dtype = tuple(kind.size), kind.properties.dtype
                is_value = key.startswith(_VALUE)
                on_device = parameter.device if not is_value and (size or _steps_on_device(group, key)) else None
                if size == layout.shape and not is_value:
                    tensor = torch.empty(local_shape(layout, mesh), dtype=dtype, device=on_device)
                    stored = stored_part(layout, tensor, mesh)
                elif not size or is_value or not _is_divided(layout, mesh):
                    tensor = torch.empty(size, dtype=dtype, device=on_device)
                    stored = stored_whole(tensor)
                else:
                    raise _refusal(type(optimizer).__name__, name, key, size)
                filled[f"{name}/{key}"] = stored, tensor
    return filled


def _steps_on_device(group: Mapping[str, Any], key: str) -> bool:
    """Whether a scalar is kept where its parameter is: torch counts steps on the processor unless they are captured."""
    return key != "step" or bool(group.get("capturable") or group.get("fused"))


def restore_optimizer(
    optimizer: Optimizer, names: Mapping[int, str], groups: list[dict[str, Any]], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Give an optimizer saved settings, and filled tensors by "parameter/key". What was not saved of a parameter is dropped."""
    by_name: dict[str, dict[str, Any]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.partition("/")
        if key.startswith(_VALUE):
            by_name.setdefault(name, {})[key.removeprefix(_VALUE)] = value_of(tensor)
        else:
            by_name.setdefault(name, {})[key] = tensor
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved["settings"])
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
            values = by_name.get(names.get(id(parameter), ""), {})
            if values:
                optimizer.state[parameter] = {key: _like(parameter, value) for key, value in values.items()}


def _like(parameter: nn.Parameter, value: Any) -> Any:
    """A local part as a distributed tensor where its parameter is one."""
    distributed: Any = parameter
    if not isinstance(distributed, DTensor) or not isinstance(value, torch.Tensor):
        return value
    if value.shape != distributed.to_local().shape:
        return value
    return DTensor.from_local(
        value,
        distributed.device_mesh,
        distributed.placements,
        run_check=False,
        shape=distributed.shape,
        stride=distributed.stride(),
    )
