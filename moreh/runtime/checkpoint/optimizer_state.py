"""Optimizer state by parameter name, and the settings of the parameter groups."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from moreh.errors import CheckpointError
from moreh.runtime.checkpoint.dcp_tensors import (
    TensorChunks,
    chunks_of_full,
    chunks_of_local,
    chunks_of_object,
    object_of_bytes,
)
from moreh.runtime.sharding.global_tensor import GlobalTensor, local_part
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import is_owner, local_shape
from moreh.runtime.sharding.spec import ParamSpec

# The prefix on the disk of a key whose value is not a tensor, such as a count of steps.
_OBJECT = "value:"
# Settings that decide which state an optimizer keeps.
_STATE_SETTINGS = ("amsgrad", "centered")


def _is_sharded(spec: ParamSpec, mesh: Mesh | None) -> bool:
    if mesh is None:
        return False
    over_tp = spec.tp_split is not None and mesh.size("tensor") > 1
    return over_tp or (spec.fsdp_dim is not None and mesh.size("data") > 1)


def _unshardable_state(optimizer: str, name: str, key: str, size: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{optimizer} keeps '{key}' of {name} as a tensor {list(size)}, which cannot be cut as the parameter is. While "
        "parameters are sharded over workers, checkpoints of a training run need an optimizer whose state has the "
        "parameters' shapes, such as AdamW; or train without tensor parallelism and sharding (pipeline and data "
        "parallelism may stay)."
    )


def collect_optimizer_state(
    optimizer: Optimizer, names: Mapping[int, str], specs: Mapping[str, ParamSpec], mesh: Mesh | None
) -> dict[str, TensorChunks]:
    """This rank's part of the optimizer's state, by "parameter/key".

    `names` has the names of the parameters by their ids.

    Raises:
        CheckpointError: there is state of a parameter without a name, or state that cannot be sharded as its parameter
            is.
    """
    kind = type(optimizer).__name__
    chunks: dict[str, TensorChunks] = {}
    for parameter, values in optimizer.state.items():
        name = names.get(id(parameter))
        if name is None:
            raise CheckpointError(
                f"{kind} has state of a parameter {list(parameter.shape)} that is none of the model's. Give it an "
                "optimizer of its own and save that with torch.save."
            )
        spec = specs[name]
        if not is_owner(spec, mesh):
            continue
        for key, value in values.items():
            if not isinstance(value, torch.Tensor):
                chunks[f"{name}/{_OBJECT}{key}"] = chunks_of_object(value, f"'{key}' of {name} in {kind}")
                continue
            local = local_part(value).detach()
            if value.shape == parameter.shape and local.shape == local_shape(spec, mesh):
                chunks[f"{name}/{key}"] = chunks_of_local(spec, local, mesh)
            elif value.dim() == 0 or not _is_sharded(spec, mesh):
                chunks[f"{name}/{key}"] = chunks_of_full(local)
            else:
                raise _unshardable_state(kind, name, key, tuple(value.shape))
    return chunks


def param_groups_of(optimizer: Optimizer, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """The parameter groups as they are stored.

    Each has the "optimizer", its "settings", and the "names" of the parameters that this rank knows.
    """
    return [
        {
            "optimizer": type(optimizer).__name__,
            "settings": {key: value for key, value in group.items() if key != "params"},
            "names": [names[id(parameter)] for parameter in group["params"] if id(parameter) in names],
        }
        for group in optimizer.param_groups
    ]


def check_param_groups(optimizer: Optimizer, names: Mapping[int, str], saved: list[dict[str, Any]]) -> None:
    """Check that the optimizer is of the class that was saved, and the parameters in the groups that were.

    Raises:
        CheckpointError: the class, a setting that decides about the state, a parameter's group, or the number of groups
            differs.
    """
    kind, groups = type(optimizer).__name__, param_groups_of(optimizer, names)
    for saved_group in saved[:1]:
        if saved_group["optimizer"] != kind:
            raise CheckpointError(
                f"The checkpoint has the state of {saved_group['optimizer']}, which {kind} cannot use. Give the "
                f"optimizer of the training that wrote the checkpoint, or start a new training from its saved model."
            )
    if len(groups) != len(saved):
        raise CheckpointError(
            f"{kind} has {len(groups)} parameter groups, the checkpoint has {len(saved)}. Make the optimizer as in the "
            "training that wrote the checkpoint."
        )
    for index, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        for key in _STATE_SETTINGS:
            given, before = (bool(each["settings"].get(key)) for each in (group, saved_group))
            if given != before:
                raise CheckpointError(
                    f"{kind} was made with {key}={given}, and the checkpoint has the state of {key}={before}. Make the "
                    "optimizer as in the training that wrote the checkpoint."
                )
        moved = set(group["names"]) - set(saved_group["names"])
        if moved:
            raise CheckpointError(
                f"Parameters of group {index} of {kind} were not in it when the checkpoint was written: "
                f"{', '.join(sorted(moved)[:5])}. Make the optimizer's groups as in the training that wrote it."
            )


def allocate_optimizer_state(
    optimizer: Optimizer,
    names: Mapping[int, str],
    specs: Mapping[str, ParamSpec],
    saved: Mapping[str, Mapping[str, TensorStorageMetadata]],
    mesh: Mesh | None,
) -> dict[str, tuple[TensorChunks, torch.Tensor]]:
    """Empty local tensors for the saved state of this rank's parameters, and their chunks to fill, by "parameter/key".

    `saved` has the tensors of the checkpoint for each parameter, by key.

    Raises:
        CheckpointError: saved state cannot be sharded as the parameter is here.
    """
    allocated: dict[str, tuple[TensorChunks, torch.Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                continue
            spec = specs[name]
            for key, metadata in saved.get(name, {}).items():
                size, dtype = tuple(metadata.size), metadata.properties.dtype
                is_object = key.startswith(_OBJECT)
                is_on_device = not is_object and (bool(size) or _counts_steps_on_device(group, key))
                device = parameter.device if is_on_device else None
                if size == spec.shape and not is_object:
                    shape = local_shape(spec, mesh) if is_owner(spec, mesh) else (0, *spec.shape[1:])
                    tensor = torch.empty(shape, dtype=dtype, device=device)
                    chunks = chunks_of_local(spec, tensor, mesh)
                elif not size or is_object or not _is_sharded(spec, mesh):
                    tensor = torch.empty(size, dtype=dtype, device=device)
                    chunks = chunks_of_full(tensor)
                else:
                    raise _unshardable_state(type(optimizer).__name__, name, key, size)
                allocated[f"{name}/{key}"] = chunks, tensor
    return allocated


def _counts_steps_on_device(group: Mapping[str, Any], key: str) -> bool:
    """True if a scalar is kept on its parameter's device. Steps are counted on the CPU unless captured or fused."""
    return key != "step" or bool(group.get("capturable") or group.get("fused"))


def restore_optimizer(
    optimizer: Optimizer,
    names: Mapping[int, str],
    groups: list[dict[str, Any]],
    tensors: Mapping[str, torch.Tensor],
    keep: Collection[str] = (),
) -> None:
    """Give an optimizer the saved settings but those in `keep`, and the filled local tensors by "parameter/key".

    The state of a parameter without saved state is dropped.
    """
    by_name: dict[str, dict[str, Any]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.partition("/")
        if key.startswith(_OBJECT):
            by_name.setdefault(name, {})[key.removeprefix(_OBJECT)] = object_of_bytes(tensor)
        else:
            by_name.setdefault(name, {})[key] = tensor
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in saved["settings"].items() if key not in keep})
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
            values = by_name.get(names.get(id(parameter), ""), {})
            if values:
                optimizer.state[parameter] = {key: _as_seen(parameter, value) for key, value in values.items()}


def _as_seen(parameter: torch.Tensor, value: Any) -> Any:
    """A local tensor as the script sees it if it is sharded as its parameter is; else the value itself."""
    if not isinstance(parameter, GlobalTensor) or not isinstance(value, torch.Tensor):
        return value
    return GlobalTensor(value, parameter.global_layout) if value.shape == parameter.local.shape else value
