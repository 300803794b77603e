"""What a script's own loop needs to work on a divided model as on a whole one: optimizers, clipping, lists of parameters."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from moreh.errors import OptionError
from moreh.runtime.checkpoint.state_dict import ShardedStateDict

_callbacks: list[Callable[[torch.optim.Optimizer], None]] = []
_not_to_pickle: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class _Replaced(nn.Parameter):
    """A parameter of a model before it was divided, which a script may still have in a list.

    Whatever is done with it is done with the parameter that took its place.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(_Replaced, lambda replaced: replaced.__dict__["_successor"], (args, kwargs or {}))
        return function(*args, **kwargs)


def on_optimizer_created(look: Callable[[torch.optim.Optimizer], None]) -> None:
    """From now on know every optimizer that is made, and let `look` see it, which may raise for one that cannot work."""
    _callbacks.append(look)
    original: Any = torch.optim.Optimizer.__init__

    def initialize(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _optimizers.add(self)
        for look in _callbacks:
            look(self)

    torch.optim.Optimizer.__init__ = initialize  # type: ignore[method-assign]


def replace_params(successors: dict[int, nn.Parameter], originals: list[nn.Parameter]) -> None:
    """Give optimizers, and lists that the script has made, the parameters that took the place of others.

    `successors` are found by the id of an original.

    Raises:
        OptionError: an optimizer has state for an original, which is not divided.
    """
    for optimizer in _optimizers:
        if any(id(parameter) in successors for parameter in optimizer.state):
            raise OptionError(
                f"the {type(optimizer).__name__} has state of the model before it was divided over workers, such as "
                "load_state_dict gives: resume with moreh.runtime.engine.checkpoint_api.load_training"
            )
        for group in optimizer.param_groups:
            group["params"] = [successors.get(id(parameter), parameter) for parameter in group["params"]]
    for original in originals:
        successor = successors[id(original)]
        if successor is not original:
            original.data = original.data.new_empty(0)
            original.__dict__["_successor"] = successor
            original.__class__ = _Replaced


def forbid_pickling_state(optimizer: torch.optim.Optimizer) -> None:
    """Each worker has the state of its own parts: written by torch.save, it would be taken for the whole."""
    if optimizer not in _not_to_pickle:
        _not_to_pickle.add(optimizer)
        rank = torch.distributed.get_rank()
        optimizer.register_state_dict_post_hook(lambda _, state: ShardedStateDict(state, rank))


def revisit_optimizers() -> None:
    """Show the optimizers that there are to the function that looks at new ones."""
    for optimizer in _optimizers:
        for look in _callbacks:
            look(optimizer)


def patch_total_norm(norm_of: Callable[[list[torch.Tensor], float], torch.Tensor | None]) -> None:
    """Let `torch.nn.utils.clip_grad_norm_` and `get_total_norm` ask `norm_of` first; None where it does not know the tensors.

    Both look their helper up by its name when they are called, so scripts that have imported them already are served too.
    """
    from torch.nn.utils import clip_grad

    original: Any = clip_grad._get_total_norm

    def get_total_norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> torch.Tensor:
        listed = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        norm = norm_of(listed, float(norm_type))
        if norm is None:
            return original(listed, norm_type, error_if_nonfinite, foreach)
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be clipped. "
                "To disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
            )
        return norm

    clip_grad._get_total_norm = get_total_norm
