"""Replaces the parameters that a script holds, in optimizers and in lists of its own, when its model is sharded."""

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from moreh.errors import OptionError
from moreh.patches.optimizer_creation import existing_optimizers
from moreh.runtime.checkpoint.state_dict import ShardedStateDict

_optimizers_without_pickling: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class _ReplacedParameter(nn.Parameter):
    """A parameter of a model before it was sharded, which a script may still have in a list.

    Every torch function that is called with it uses its replacement. `torch.utils.swap_tensors` would keep the object
    instead, but refuses to swap a parameter with a DTensor, which tensor parallelism and sharding need.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(
            _ReplacedParameter, lambda replaced: replaced.__dict__["_replacement"], (args, kwargs or {})
        )
        return function(*args, **kwargs)


def replace_params(replacements: dict[int, nn.Parameter], originals: list[nn.Parameter]) -> None:
    """Put new parameters in the place of a model's originals, in optimizers and in lists that the script has made.

    `replacements` maps the id of an original to the new parameter. The data of the originals is freed.

    Raises:
        OptionError: an optimizer has state for an original, which is not sharded.
    """
    for optimizer in existing_optimizers():
        if any(id(parameter) in replacements for parameter in optimizer.state):
            raise OptionError(
                f"the {type(optimizer).__name__} has state from before the model was sharded over workers, such as "
                "load_state_dict gives: resume with moreh.runtime.engine.checkpoint_api.load_training"
            )
        for group in optimizer.param_groups:
            group["params"] = [replacements.get(id(parameter), parameter) for parameter in group["params"]]
    for original in originals:
        replacement = replacements[id(original)]
        if replacement is not original:
            original.data = original.data.new_empty(0)
            original.__dict__["_replacement"] = replacement
            original.__class__ = _ReplacedParameter


def forbid_pickling_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's `state_dict()` refuse to be pickled: each rank has the state of its own shards only.

    A file that `torch.save` wrote of it would be taken for the state of the whole model.
    """
    if optimizer not in _optimizers_without_pickling:
        _optimizers_without_pickling.add(optimizer)
        rank = torch.distributed.get_rank()
        optimizer.register_state_dict_post_hook(lambda _, state: ShardedStateDict(state, rank))
