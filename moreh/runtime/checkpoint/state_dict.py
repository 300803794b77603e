"""`state_dict` and `load_state_dict` of a sharded model."""

import copy
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from moreh.errors import WorkerError
from moreh.runtime.checkpoint.hf_save_plan import persistent_buffers, state_dict_entries
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import check_local_tensors, local_shards
from moreh.runtime.sharding.spec import ParamSpec


class ShardedStateDict(dict[str, Any]):
    """What one rank holds of a state dict. It can be copied and loaded again, but not pickled as if it were whole.

    Raises (when it is pickled, as by torch.save):
        WorkerError: always; the message says how to save the whole model.
    """

    def __init__(self, tensors: Mapping[str, Any], rank: int | None = None) -> None:
        super().__init__(tensors)
        # Libraries make a dict of the same type from a dict, without a rank.
        self.rank = dist.get_rank() if rank is None else rank

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise WorkerError(
            f"This state dict holds the part of rank {self.rank} only, since the model is sharded over workers. Save "
            "the model with model.save_pretrained(directory) on all ranks, and a training run to resume with "
            "moreh.runtime.engine.checkpoint_api.save_training."
        )

    def copy(self) -> "ShardedStateDict":
        """Another dict with the same tensors."""
        return ShardedStateDict(self, self.rank)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedStateDict":
        return ShardedStateDict({name: copy.deepcopy(value, memo) for name, value in self.items()}, self.rank)


def local_state_dict(model: nn.Module, local_tensors: Mapping[str, torch.Tensor], rank: int) -> ShardedStateDict:
    """The entries that a rank holds, with the names and in the order of the full model. Tied entries share a tensor."""
    tensors = {**local_tensors, **persistent_buffers(model)}
    entries = state_dict_entries(model)
    return ShardedStateDict(
        {name: tensors[entry.source] for name, entry in entries.items() if entry.source in tensors}, rank
    )


@torch.no_grad()
def load_into_local_tensors(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    specs: Mapping[str, ParamSpec],
    local_tensors: Mapping[str, torch.Tensor],
    mesh: Mesh | None,
    *,
    strict: bool = True,
) -> _IncompatibleKeys:
    """Load the full model's state dict, or one of `local_state_dict`, into local tensors and the model's buffers.

    Copies this rank's shards of the full model's tensors, or the tensors of a ShardedStateDict as they are. Returns the
    missing and unexpected keys, as Module.load_state_dict does.

    Raises:
        RuntimeError: a tensor has the wrong shape, or with `strict` keys are missing or unexpected. Nothing is loaded
            then.
    """
    check_local_tensors(specs, local_tensors, mesh)
    entries = state_dict_entries(model)
    buffers = persistent_buffers(model)
    is_sharded = isinstance(state_dict, ShardedStateDict)
    expected = {
        name for name, entry in entries.items() if not is_sharded or entry.source in local_tensors or name in buffers
    }
    missing = [name for name in entries if name in expected - state_dict.keys()]
    unexpected = [name for name in state_dict if name not in expected]
    problems = [f"missing keys {missing}"] * bool(strict and missing)
    problems += [f"unexpected keys {unexpected}"] * bool(strict and unexpected)
    for name in expected & state_dict.keys():
        source = entries[name].source
        if source in buffers:
            shape = tuple(buffers[source].shape)
        else:
            shape = tuple(local_tensors[source].shape) if is_sharded else specs[source].shape
        if tuple(state_dict[name].shape) != shape:
            problems.append(f"{name} has the shape {tuple(state_dict[name].shape)} instead of {shape}")
    if problems:
        raise RuntimeError(f"The state dict does not fit {type(model).__name__}: {'; '.join(problems[:5])}.")
    for name in expected & state_dict.keys():
        source = entries[name].source
        if source in buffers:
            buffers[source].copy_(state_dict[name])
        elif is_sharded:
            local_tensors[source].copy_(state_dict[name])
        elif source in local_tensors:
            for shard in local_shards(specs[source], mesh):
                shard.view_of_local(local_tensors[source]).copy_(shard.view_of_full(state_dict[name]))
    return _IncompatibleKeys(missing, unexpected)
