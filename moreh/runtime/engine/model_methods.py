"""Methods of a model of transformers that have to work while it is divided: saving, state dicts and generation."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel

from moreh.errors import OptionError
from moreh.runtime.checkpoint.hf_save import save_sharded_model
from moreh.runtime.checkpoint.state_dict import ShardedStateDict, load_into_local_tensors, local_state_dict
from moreh.runtime.engine.parallel_model import ParallelModel
from moreh.runtime.sharding.gather import full_tensor


def replace_methods(model: ParallelModel) -> None:
    """Let the model that the script has save, load and generate as a divided one; for all ranks to call, as everything else."""
    root: Any = model.decoder.root

    def save(directory: str | os.PathLike[str], **settings: Any) -> None:
        # transformers' Trainer gives None, or what `state_dict` below has returned: the model's own weights.
        if isinstance(settings.get("state_dict"), ShardedStateDict | None):
            settings.pop("state_dict", None)
        save_sharded_model(root, directory, model.layouts, model.local_tensors(), model.mesh, **settings)

    def state_dict(*args: Any, **kwargs: Any) -> ShardedStateDict:
        if args or any(kwargs.values()):
            raise OptionError(
                f"state_dict{args}: a model that is divided over workers takes no arguments here; leave them out"
            )
        return local_state_dict(root, model.local_tensors(), torch.distributed.get_rank())

    def load_state_dict(state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> _IncompatibleKeys:
        if assign:
            raise OptionError("load_state_dict(assign=True): a model that is divided over workers copies; leave it out")
        return load_into_local_tensors(root, state, model.layouts, model.local_tensors(), model.mesh, strict=strict)

    root.state_dict, root.load_state_dict = state_dict, load_state_dict
    root.save_pretrained = save if isinstance(root, PreTrainedModel) else _save_adapters(root, model)
    for module in {id(m): m for m in (root, model.decoder.causal)}.values():
        if hasattr(module, "generate"):
            module.generate = _generate_without_cache(module)


def _save_adapters(root: Any, model: ParallelModel) -> Any:
    """PEFT's own `save_pretrained`, given the adapters as whole tensors: they are small."""
    original = root.save_pretrained

    def save(directory: str | os.PathLike[str], **settings: Any) -> None:
        local = model.local_tensors()
        trained = {name for name, parameter in root.named_parameters() if parameter.requires_grad}
        whole = {
            name: full_tensor(layout, local.get(name), model.mesh)
            for name, layout in model.layouts.items()
            if name in trained
        }
        first = torch.distributed.get_rank() == 0
        original(directory, **{**settings, "state_dict": whole, "is_main_process": first})
        torch.distributed.barrier()

    return save


def _generate_without_cache(module: nn.Module) -> Any:
    """Generation that computes each token from the whole text: keys and values of earlier tokens are on other workers."""
    original: Any = module.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            raise OptionError(
                "generate(past_key_values=...): a model that is divided over workers keeps no cache; leave it out"
            )
        return original(*args, **{**kwargs, "use_cache": False})

    return generate
