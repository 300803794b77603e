"""`save_pretrained` of a sharded model: the files that one worker would write. No rank ever has the full model.

Rank 0 writes. The ranks send it their shards, one full tensor at a time.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moreh.atomic_io import commit_files, make_staging_directory
from moreh.errors import OptionError
from moreh.runtime.checkpoint.hf_save_plan import (
    Conversion,
    SavePlan,
    persistent_buffers,
    plan_save,
    with_full_shapes,
)
from moreh.runtime.checkpoint.safetensors_writer import SafetensorsWriter
from moreh.runtime.launch.collective_errors import failing_together
from moreh.runtime.sharding.gather import gather_to_rank0
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import check_local_tensors, global_rank_of
from moreh.runtime.sharding.spec import ParamSpec

# Unsupported arguments of save_pretrained, each with its remedy.
_REFUSED = {
    "state_dict": "leave it out: the weights that are saved are the model's own",
    "push_to_hub": "save first, then upload the directory with `hf upload`",
    "distributed_checkpoint": "leave it out, or use torch.distributed.checkpoint to resume a training run",
}


def save_sharded_model(
    model: nn.Module,
    directory: str | os.PathLike[str],
    specs: Mapping[str, ParamSpec],
    local_tensors: Mapping[str, torch.Tensor],
    mesh: Mesh,
    **save_kwargs: Any,
) -> None:
    """Save a sharded model as `PreTrainedModel.save_pretrained` saves a full one; collective, with equal arguments.

    - Rank 0 needs memory for the largest tensor, or for the tensors that transformers converts together.
    - The files get their names when all files are written. A new directory appears at once with all its files. In an
      existing directory the files with which loading begins are removed first and moved in last.
    - If a rank fails, nothing has changed and all ranks raise.

    Args:
        model: the modules of the full model. Their tensors do not matter.
        directory: where to save.
        specs: the specs of the model's parameters, by name; tied ones under their first name.
        local_tensors: the local tensors of the parameters that this rank holds, by the same names.
        mesh: the ranks.
        save_kwargs: keyword arguments of `save_pretrained`.

    Raises:
        OptionError: an argument does not work while the model is sharded.
        WorkerError: another rank failed. The rank that failed raises its own error, such as OSError.
    """
    _check_arguments(save_kwargs)
    writes = save_kwargs.pop("is_main_process", True) if global_rank_of(mesh) == 0 else True
    target = Path(directory)
    action = f"saving the model to {target}"
    plan: SavePlan | None = None
    staging: Path | None = None
    try:
        with failing_together(action, device=mesh.device):
            check_local_tensors(specs, local_tensors, mesh)
            if global_rank_of(mesh) == 0 and writes:
                staging = make_staging_directory(target, inside=True)
                with with_full_shapes(model, specs):
                    plan = plan_save(model, staging, save_kwargs)
        plans = [plan]
        dist.broadcast_object_list(plans, 0, device=mesh.device)
        if plans[0] is not None:
            _write_files(model, staging, plans[0], specs, local_tensors, mesh, action)
            with failing_together(action, device=mesh.device):
                if staging is not None:
                    _commit(staging, target, plans[0], save_kwargs.get("variant"))
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _check_arguments(save_kwargs: Mapping[str, Any]) -> None:
    if save_kwargs.get("safe_serialization", True) is not True:
        raise OptionError("safe_serialization=False: models are saved as safetensors only; leave the argument out.")
    for name, remedy in _REFUSED.items():
        if save_kwargs.get(name):
            raise OptionError(
                f"save_pretrained({name}=...) does not work while the model is sharded over workers; {remedy}."
            )


def _write_files(
    model: nn.Module,
    directory: Path | None,
    plan: SavePlan,
    specs: Mapping[str, ParamSpec],
    local_tensors: Mapping[str, torch.Tensor],
    mesh: Mesh,
    action: str,
) -> None:
    """Gather and write all tensors; collective. `directory` is where rank 0 writes, None on other ranks."""
    file_of = {name: file for file in plan.files for name in file.tensors}
    buffers = persistent_buffers(model)
    writers: dict[str, SafetensorsWriter] = {}

    def write(tensors: dict[str, torch.Tensor], directory: Path) -> None:
        for name, tensor in tensors.items():
            file = file_of[name]
            if file.name not in writers:
                writers[file.name] = SafetensorsWriter(directory / file.name, file.tensors, file.metadata)
            writers[file.name].write(name, tensor)

    try:
        for conversion in plan.conversions:
            full_tensors = {
                name: buffers[name] if name in buffers else gather_to_rank0(specs[name], local_tensors.get(name), mesh)
                for name in conversion.sources
            }
            with failing_together(action, device=mesh.device):
                if directory is not None:
                    write(_convert(model, conversion, full_tensors, specs), directory)
            del full_tensors  # before the next ones are gathered
    finally:
        for writer in writers.values():
            writer.close()


def _convert(
    model: Any, conversion: Conversion, full_tensors: dict[str, Any], specs: Mapping[str, ParamSpec]
) -> dict[str, torch.Tensor]:
    """The tensors of the files, by name, from those of the model."""
    if conversion.is_identity:
        return {conversion.targets[0]: full_tensors[conversion.sources[0]]}
    from transformers.core_model_loading import revert_weight_conversion

    with with_full_shapes(model, specs):
        converted = revert_weight_conversion(model, full_tensors)
    return {name: converted[name] for name in conversion.targets}


def _commit(staging: Path, target: Path, plan: SavePlan, variant: str | None) -> None:
    """Move the written files into the target, over an older model of the same variant."""
    weights = re.sub(r"-\d{5}-of-\d{5}", "", plan.files[0].name)
    index = f"model.safetensors.index{f'.{variant}' if variant else ''}.json"
    numbered = re.compile(re.escape(weights.removesuffix(".safetensors")) + r"-\d{5}-of-\d{5}\.safetensors")
    commit_files(staging, target, entry_points={weights, index}, obsolete=numbered)
