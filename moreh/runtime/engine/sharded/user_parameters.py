"""Replaces the script's parameters, in optimizers and in its own lists, when their model is sharded."""

import copy
import weakref
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from moreh.errors import OptionError
from moreh.patches.optimizer_creation import existing_optimizers
from moreh.runtime.sharding.global_tensor import GlobalTensor, own_attributes

# A key in the `__dict__` that a parameter from before sharding shares with its replacement.
_REPLACEMENT = "_moreh_replacement"
_optimizers_of_shards: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class _ReplacedParameter(nn.Parameter):
    """A parameter of a model before it was sharded, which a script may still have in a list.

    Every torch function that is called with it uses its replacement. `torch.utils.swap_tensors` would keep the object
    instead, but refuses to swap a parameter with a tensor of another class, which sharding needs.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(
            _ReplacedParameter, lambda replaced: replaced.__dict__[_REPLACEMENT], (args, kwargs or {})
        )
        return function(*args, **kwargs)

    def __eq__(self, other: object) -> Any:
        """Elementwise; true for the replacement, so that a dictionary whose key is the original finds it."""
        return True if other is self.__dict__[_REPLACEMENT] else super().__eq__(other)

    __hash__ = nn.Parameter.__hash__

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__dict__[_REPLACEMENT].__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__dict__[_REPLACEMENT], memo)


def replace_params(replacements: dict[int, nn.Parameter], originals: list[nn.Parameter]) -> None:
    """Put new parameters in the place of a model's originals, in optimizers and in lists that the script has made.

    `replacements` maps the id of an original to the new parameter. The data of the originals is freed. State that an
    optimizer has for an original, such as `load_state_dict` gives, is sharded as the new parameter is. Both have the
    same attributes, whichever the script gives them to and when, and dictionaries whose keys are originals take either.
    """
    for optimizer in existing_optimizers():
        for group in optimizer.param_groups:
            group["params"] = [replacements.get(id(parameter), parameter) for parameter in group["params"]]
        for original in [parameter for parameter in optimizer.state if id(parameter) in replacements]:
            optimizer.state[replacements[id(original)]] = optimizer.state.pop(original)
        _shard_state(optimizer)
    for original in originals:
        replacement = replacements[id(original)]
        if replacement is not original:
            replacement.__dict__.update(own_attributes(original))
            if original.requires_grad:
                original.register_hook(_refuse_earlier_graph)
            # Without memory, in the shape that the backward pass of an earlier graph expects until it reaches the hook.
            original.data = original.data.new_zeros(()).expand(original.shape)
            replacement.__dict__[_REPLACEMENT] = replacement
            original.__dict__ = replacement.__dict__
            original.__class__ = _ReplacedParameter


def _refuse_earlier_graph(grad: torch.Tensor) -> NoReturn:
    """Refuse a gradient for a parameter that is not the model's any more."""
    raise OptionError(
        "backward() through what was computed with a model's parameters before its first training batch, which has "
        "sharded them over workers since: compute it after that batch, or call backward() before"
    )


def keep_state_sharded(optimizer: torch.optim.Optimizer) -> None:
    """Let `optimizer.load_state_dict` take whole tensors, as `state_dict` pickles them, and keep this rank's parts."""
    if optimizer not in _optimizers_of_shards:
        _optimizers_of_shards.add(optimizer)
        optimizer.register_load_state_dict_post_hook(_shard_state)


def _shard_state(optimizer: torch.optim.Optimizer) -> None:
    for parameter, values in optimizer.state.items():
        if not isinstance(parameter, GlobalTensor):
            continue
        for key, value in values.items():
            is_whole = isinstance(value, torch.Tensor) and not isinstance(value, GlobalTensor)
            if is_whole and value.dim() and value.shape == parameter.shape:
                values[key] = GlobalTensor(parameter.global_layout.shard(value), parameter.global_layout)
