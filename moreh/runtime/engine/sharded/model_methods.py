"""Methods of a sharded transformers model: saving, state dicts, moves, generation."""

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moreh.errors import OptionError
from moreh.models.introspection import unwrapped, wrappers
from moreh.runtime.batch.model_inputs import CACHE_ARGUMENTS
from moreh.runtime.checkpoint.copies import copy_to_other_directories
from moreh.runtime.checkpoint.hf_save import save_sharded_model
from moreh.runtime.engine.parallel_model import ParallelModel, local_tensor
from moreh.runtime.sharding.global_tensor import GlobalTensor, WholeTensor
from moreh.trace import span


def replace_methods(model: ParallelModel) -> None:
    """Give the script's model methods that save, load, move and generate while it is sharded.

    All but moves are collective.
    """
    root: Any = model.parts.root
    for wrapper in wrappers(root):
        # DataParallel and others have no `save_pretrained`; torch.compile's wrapper has that of the compiled model.
        if hasattr(wrapper, "peft_config"):
            wrapper.__dict__["save_pretrained"] = _save_adapters(wrapper, model.mesh.device)
    causal: Any = unwrapped(root)
    if isinstance(causal, PreTrainedModel):
        causal.__dict__["save_pretrained"] = functools.partial(_save_model, causal, model)
    for module in root.modules():
        # Past Module.__setattr__. Unlike a bound method, a partial is copied with the module in it.
        module.__dict__["_apply"] = functools.partial(_stay, module, model.mesh.device)
        module.__dict__["load_state_dict"] = functools.partial(_copy_state_dict, module)
    # Also where the model is a part of a module whose state is asked for.
    root.register_state_dict_post_hook(_unite_tied_entries)
    for module in {id(m): m for m in (root, model.parts.causal)}.values():
        if hasattr(module, "generate"):
            module.generate = _generate_without_cache(module)


def _save_model(module: Any, model: ParallelModel, directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Replaces `save_pretrained` of a model of transformers, which may be inside wrappers."""
    # transformers' Trainer passes None or the result of `state_dict()`: the model's own weights.
    if _is_own_state(module, kwargs.get("state_dict")):
        kwargs.pop("state_dict", None)
    names, local = _names_in(module, model), model.local_tensors()
    specs = {name: replace(model.specs[source], name=name) for name, source in names.items()}
    shards = {name: local[source] for name, source in names.items() if source in local}
    with span("save_pretrained"):
        save_sharded_model(module, directory, specs, shards, model.mesh, **kwargs)
        copy_to_other_directories(directory, model.mesh.device)


def _names_in(module: nn.Module, model: ParallelModel) -> dict[str, str]:
    """The names of parameters in the whole model, by their names in a part of it."""
    whole = {id(parameter): name for name, parameter in model.user_params.items()}
    return {name: whole[id(parameter)] for name, parameter in module.named_parameters()}


def _copy_state_dict(
    module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    """Replaces `load_state_dict`: calls torch's own, which copies whole tensors into this rank's parts.

    Raises:
        OptionError: the tensors themselves would become the parameters.
    """
    if assign:
        raise OptionError(
            "load_state_dict(assign=True): the parameters of a model that is sharded over workers are parts of tensors "
            "and stay; leave assign out, which copies"
        )
    with span("load_state_dict"):
        return type(module).load_state_dict(module, state_dict, strict=strict)


def _unite_tied_entries(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Make the entries of one parameter one object, so that pickling writes it once, as it does tensors of one memory.

    Entries of parameters themselves (`keep_vars=True`) are one object already.
    """
    seen: dict[int, torch.Tensor] = {}
    for name, value in state_dict.items():
        if isinstance(value, GlobalTensor) and name.startswith(prefix):
            state_dict[name] = seen.setdefault(id(value.local), value)


def _is_own_state(root: nn.Module, state_dict: Any) -> bool:
    """True if a state dict is None or has the model's own parameters, as `state_dict()` returns them, not copies."""
    if state_dict is None:
        return True
    own = root.state_dict()
    return own.keys() == state_dict.keys() and all(_shares_memory(state_dict[name], own[name]) for name in own)


def _shares_memory(value: Any, own: torch.Tensor) -> bool:
    if type(value) is not type(own) or value.shape != own.shape:
        return False
    return bool(local_tensor(value).is_set_to(local_tensor(own)))


def _stay(
    module: nn.Module, device: torch.device, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    """Replaces `_apply`, through which torch moves and casts a module: the shards stay where they are.

    Raises:
        OptionError: the parameters would get another dtype, or lose their data.
    """
    for dtype in {parameter.dtype for parameter in module.parameters()}:
        result = function(torch.empty(0, dtype=dtype, device=device))
        if result.dtype != dtype:
            raise OptionError(
                f"a {type(module).__name__} that is sharded over workers was cast from {dtype} to {result.dtype}: cast "
                f"it before its first training batch, or save it and load it with dtype={result.dtype}"
            )
        if result.is_meta:
            raise OptionError(
                f"a {type(module).__name__} that is sharded over workers was moved to the meta device, where its data "
                "would be lost: delete the model instead"
            )
    return module


def _save_adapters(wrapper: Any, device: torch.device) -> Any:
    """PEFT's own `save_pretrained` of whole tensors, which are gathered because adapters are small.

    Raises (from the returned function):
        OptionError: other weights than the model's own are to be saved.
    """
    original = wrapper.save_pretrained

    def save(directory: str | os.PathLike[str], **kwargs: Any) -> None:
        if not _is_own_state(wrapper, kwargs.get("state_dict")):
            raise OptionError(
                "save_pretrained(state_dict=...) does not work while the model is sharded over workers; leave it out: "
                "the weights that are saved are the model's own."
            )
        with span("save_pretrained"):
            saved = _adapter_state(wrapper, kwargs.get("save_embedding_layers", "auto"))
            whole = {
                name: tensor.full_tensor() if isinstance(tensor, WholeTensor) else tensor
                for name, tensor in saved.items()
            }
            is_first = torch.distributed.get_rank() == 0
            original(directory, **{**kwargs, "state_dict": whole, "is_main_process": is_first})
            torch.distributed.barrier()
            copy_to_other_directories(directory, device)

    return save


def _adapter_state(wrapper: Any, save_embedding_layers: Any) -> dict[str, Any]:
    """The entries of a model's state dict that PEFT saves: of trained, frozen and inactive adapters."""
    from peft import get_peft_model_state_dict

    state = wrapper.state_dict()
    saved = {
        id(tensor)
        for adapter in wrapper.peft_config
        for tensor in get_peft_model_state_dict(
            wrapper, state, adapter, save_embedding_layers=save_embedding_layers
        ).values()
    }
    return {name: tensor for name, tensor in state.items() if id(tensor) in saved}


def _generate_without_cache(module: nn.Module) -> Any:
    """Generation that computes each token from the whole sequence: each rank has some keys of earlier tokens only."""
    original: Any = module.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        if given := [name for name in CACHE_ARGUMENTS if kwargs.get(name) is not None]:
            raise OptionError(
                f"generate({given[0]}=...): a model that is sharded over workers keeps no cache; leave it out"
            )
        return original(*args, **{**kwargs, "use_cache": False})

    return generate
