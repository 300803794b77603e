"""The script's use of earlier calls, which predicts what the next call must compute.

The runtime is fast where a script calls `backward()` once for each loss and reads nothing else. Whatever else a script
does is computed when it happens; once it is known of a script, the model's own forward pass gives all of it in one.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moreh.log import logger

# Calls until the share of those that were used otherwise says something.
_FEW_CALLS = 4


@dataclass
class LossUse:
    """The use that a script has made of one loss."""

    used: bool = False
    """True if a backward pass has come through the loss."""


class CallHistory:
    """The calls with labels of one model in one mode: training or evaluating, with gradients or without."""

    def __init__(self, *, training: bool) -> None:
        self.needs_own_forward = False
        # True once a call of a sharded model has kept the weights before a step.
        self.has_kept_weights = False
        self._training = training
        self._calls = self._reads = self._late_gradients = 0
        self._last: LossUse | None = None

    @property
    def expects_backward(self) -> bool:
        """True if the script is likely to call `backward()` on the next loss: as on the last, first if it trains."""
        return self._training if self._last is None else self._last.used

    def add_call(self) -> LossUse:
        """Note a call; returns where the use of its loss is to be noted."""
        self._calls += 1
        self._last = LossUse()
        return self._last

    def add_read(self, *, late: bool) -> None:
        """Note that an output beside the loss was read; `late` says after the weights have changed."""
        self._reads += 1
        if late or self._reads * 4 >= self._calls:
            self.use_own_forward("reads outputs beside the loss")

    def add_late_gradients(self) -> None:
        """Note that the gradients of a loss were computed at its `backward()`, since that was not expected."""
        self._late_gradients += 1
        if self._calls >= _FEW_CALLS and self._late_gradients * 4 >= self._calls * 3:
            self.use_own_forward("keeps several losses before it calls backward()")

    def use_own_forward(self, what: str) -> None:
        """Leave later calls in this mode to the model's own forward pass."""
        if not self.needs_own_forward:
            logger.info("The script %s: from now on the model's own forward pass computes such calls.", what)
        self.needs_own_forward = True


class CallHistories:
    """The histories of all models."""

    def __init__(self) -> None:
        self._by_model: weakref.WeakKeyDictionary[nn.Module, dict[Any, CallHistory]] = weakref.WeakKeyDictionary()

    def of(self, module: nn.Module) -> CallHistory:
        """The history of a model's calls in the mode that it is in."""
        histories = self._by_model.setdefault(module, {})
        mode = module.training, torch.is_grad_enabled()
        if mode not in histories:
            histories[mode] = CallHistory(training=module.training)
        return histories[mode]
