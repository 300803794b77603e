"""`save_pretrained` of a divided model: the files that one worker would save, written without any rank holding the model.

Rank 0 writes. Each tensor is sent to it in pieces by the ranks that hold them, one tensor at a time.
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

from moreh.errors import OptionError
from moreh.runtime.checkpoint.atomic_dir import publish_files, unfinished_directory
from moreh.runtime.checkpoint.hf_save_plan import (
    Conversion,
    SavePlan,
    persistent_buffers,
    plan_saving,
    with_full_shapes,
)
from moreh.runtime.checkpoint.safetensors_writer import SafetensorsWriter
from moreh.runtime.launch.collective_errors import raise_on_all_ranks
from moreh.runtime.sharding.gather import gather_to_rank0
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import check_local_tensors, global_rank_of
from moreh.runtime.sharding.spec import ParamSpec

# What save_pretrained takes that is not done here, and what to do instead.
_REFUSED = {
    "state_dict": "leave it out: the weights that are saved are the model's own",
    "save_function": "leave it out: the files are written piece by piece",
    "push_to_hub": "save first, then upload the directory with `hf upload`",
    "distributed_checkpoint": "leave it out, or use torch.distributed.checkpoint to resume a training",
}


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    layouts: Mapping[str, ParamSpec],
    local_tensors: Mapping[str, torch.Tensor],
    mesh: Mesh,
    **settings: Any,
) -> None:
    """Save a divided model as `PreTrainedModel.save_pretrained` saves a whole one; for all ranks to call, with equal arguments.

    `layouts` are those of the model's parameters by name (tied ones under their first name), `local_tensors` what this rank
    holds of them. `model` has the modules of the whole model, whatever tensors are in them. `settings` are `save_pretrained`'s.

    Rank 0 needs memory for the largest tensor, or for those that transformers converts together. The files appear under their
    names when all are written: a new directory as one, in an existing one the file that loading begins with comes last, and
    older weights are gone by then. Where a rank fails, nothing has changed and all ranks raise.

    Raises:
        OptionError: an argument that a divided model has no use for.
        WorkerError: another rank failed; the failed rank itself raises its own error, such as OSError.
    """
    if settings.get("safe_serialization", True) is not True:
        raise OptionError("safe_serialization=False: models are saved as safetensors only; leave the argument out.")
    for name, remedy in _REFUSED.items():
        if settings.get(name):
            raise OptionError(
                f"save_pretrained({name}=...) does not work while the model is divided over workers; {remedy}."
            )
    writes = settings.pop("is_main_process", True) if global_rank_of(mesh) == 0 else True
    target = Path(directory)
    doing = f"saving the model to {target}"
    error: Exception | None = None
    files: SavePlan | None = None
    unfinished: Path | None = None
    try:
        check_local_tensors(layouts, local_tensors, mesh)
        if global_rank_of(mesh) == 0 and writes:
            unfinished = unfinished_directory(target, inside=True)
            with with_full_shapes(model, layouts):
                files = plan_saving(model, unfinished, settings)
    except Exception as raised:
        error = raised
    try:
        raise_on_all_ranks(error, doing, mesh.device)
        described = [files]
        dist.broadcast_object_list(described, 0, device=mesh.device)
        if described[0] is not None:
            _write_files(model, unfinished, described[0], layouts, local_tensors, mesh, doing)
            _publish_together(unfinished, target, described[0], settings.get("variant"), mesh, doing)
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _write_files(
    model: nn.Module,
    directory: Path | None,
    files: SavePlan,
    layouts: Mapping[str, ParamSpec],
    local_tensors: Mapping[str, torch.Tensor],
    mesh: Mesh,
    doing: str,
) -> None:
    """Gather and write all tensors. `directory` is where rank 0 writes, None on other ranks."""
    file_of = {name: file for file in files.files for name in file.tensors}
    buffers = persistent_buffers(model)
    writers: dict[str, SafetensorsWriter] = {}

    def write(made: dict[str, torch.Tensor], directory: Path) -> None:
        for name, tensor in made.items():
            file = file_of[name]
            if file.name not in writers:
                writers[file.name] = SafetensorsWriter(directory / file.name, file.tensors, file.metadata)
            writers[file.name].write(name, tensor)

    try:
        for conversion in files.conversions:
            error: Exception | None = None
            gathered = {
                name: buffers[name]
                if name in buffers
                else gather_to_rank0(layouts[name], local_tensors.get(name), mesh)
                for name in conversion.sources
            }
            try:
                if directory is not None:
                    write(_converted(model, conversion, gathered, layouts), directory)
            except Exception as raised:
                error = raised
            del gathered
            raise_on_all_ranks(error, doing, mesh.device)
    finally:
        for writer in writers.values():
            writer.close()


def _converted(
    model: Any, conversion: Conversion, gathered: dict[str, Any], layouts: Mapping[str, ParamSpec]
) -> dict[str, torch.Tensor]:
    """The tensors that are saved, made from those of the model."""
    if conversion.as_it_is:
        return {conversion.saved[0]: gathered[conversion.sources[0]]}
    from transformers.core_model_loading import revert_weight_conversion

    with with_full_shapes(model, layouts):
        made = revert_weight_conversion(model, gathered)
    return {name: made[name] for name in conversion.saved}


def _publish_together(
    unfinished: Path | None, target: Path, files: SavePlan, variant: str | None, mesh: Mesh, doing: str
) -> None:
    error = None
    try:
        if unfinished is not None:
            weights = re.sub(r"-\d{5}-of-\d{5}", "", files.files[0].name)
            index = f"model.safetensors.index{f'.{variant}' if variant else ''}.json"
            shard = re.compile(re.escape(weights.removesuffix(".safetensors")) + r"-\d{5}-of-\d{5}\.safetensors")
            publish_files(unfinished, target, {weights, index}, shard)
    except Exception as raised:
        error = raised
    raise_on_all_ranks(error, doing, mesh.device)
