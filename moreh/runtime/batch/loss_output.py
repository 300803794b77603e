"""What a model returns for a batch with labels: the loss, and on one worker its other outputs when asked for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from moreh.errors import OptionError
from moreh.trace import span

BACKWARD_TWICE_MESSAGE = (
    "Trying to backward through the loss a second time: its gradients are gone. Call the model again"
)


@dataclass
class LossOutput(ModelOutput):
    """What a sharded model returns for a batch with labels. The logits exist only in parts, on different ranks."""

    loss: torch.Tensor | None = None
    """The mean loss over the label tokens of the whole batch, a scalar."""

    def __getattr__(self, name: str) -> Any:
        if name == "logits":
            raise OptionError(
                "logits of a batch with labels: a model that is sharded over workers does not keep them; "
                "call it without labels, under torch.no_grad(), for logits"
            )
        raise AttributeError(f"{type(self).__name__} has no {name}: it has the loss")


@dataclass
class LazyLogitsOutput(ModelOutput):
    """The loss. The model's other outputs, such as logits, are computed when the script asks for them."""

    loss: torch.Tensor | None = None
    """The mean loss over the label tokens of the batch, a scalar."""

    def with_lazy(self, compute: Callable[[], ModelOutput]) -> "LazyLogitsOutput":
        """Set the function that computes the model's outputs, which is called at most once; returns `self`."""
        self.__dict__["_compute"] = compute
        return self

    def _fill(self) -> None:
        compute = self.__dict__.pop("_compute", None)
        if compute is not None:
            for name, value in compute().items():
                if name != "loss":
                    self[name] = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self._fill()
        if name in self.__dict__:
            return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def __getitem__(self, key: Any) -> Any:
        return self.loss if key in (0, "loss") else super().__getitem__(key)  # type: ignore[no-untyped-call]

    def __contains__(self, key: object) -> bool:
        self._fill()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return super().__iter__()

    def __len__(self) -> int:
        self._fill()
        return super().__len__()

    def keys(self) -> Any:
        """The names of all outputs."""
        self._fill()
        return super().keys()

    def items(self) -> Any:
        """All outputs with their names."""
        self._fill()
        return super().items()

    def values(self) -> Any:
        """All outputs."""
        self._fill()
        return super().values()


def loss_with_computed_grads(loss: torch.Tensor, grads: list[tuple[nn.Parameter, torch.Tensor]]) -> torch.Tensor:
    """The loss as a function of parameters whose gradients exist already; its backward pass uses them up."""
    parameters = [parameter for parameter, _ in grads]
    loss_of_parameters: torch.Tensor = _LossWithComputedGrads.apply(loss, [grad for _, grad in grads], *parameters)  # type: ignore[no-untyped-call]
    return loss_of_parameters


class _LossWithComputedGrads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, grads: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(BACKWARD_TWICE_MESSAGE)
        if torch.is_grad_enabled():
            raise OptionError(
                "create_graph=True: the gradients of a batch with labels are computed in the call and cannot be "
                "differentiated again; call the model without labels for a loss of your own"
            )
        grads, ctx.grads = ctx.grads, None
        with span("accumulate_grads"):
            scale = grad_outputs[0].item()
            if scale != 1.0:
                for grad in grads:
                    grad.mul_(scale)
        return None, None, *grads
