"""Calls whose outputs a script has not read: before an optimizer's step they keep the weights that it changes."""

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

CHANGED_SINCE_CALL = (
    "outputs other than the loss are computed when they are asked for, and the model or its inputs have changed since "
    "the call: read them before the optimizer's step and the model's next call"
)


class UnreadCall(Protocol):
    """A call with outputs that are computed when the script reads them."""

    def keep_weights(self, changing: set[int]) -> None:
        """Copy the weights with these ids, which an optimizer is about to change."""


_unread: weakref.WeakSet[UnreadCall] = weakref.WeakSet()
_hook: Any = None


def keep_weights_at_steps(call: UnreadCall) -> None:
    """Let a call keep the weights that an optimizer changes, while its outputs are alive and unread."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_optimizer_step)
    _unread.add(call)


def stop_keeping_weights(call: UnreadCall) -> None:
    """Let a call keep no weights at later steps: its outputs were read, or will not be."""
    _unread.discard(call)


def _before_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _unread:
        groups = (group["params"] for group in optimizer.param_groups)
        # Parameters without a gradient do not change.
        changing = {id(p) for p in itertools.chain.from_iterable(groups) if p.grad is not None}
        for call in list(_unread):
            call.keep_weights(changing)
