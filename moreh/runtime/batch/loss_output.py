"""What a model returns for a batch with labels: the loss, and what else the model has if there is one worker."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from moreh.errors import OptionError

BACKWARD_TWICE_MESSAGE = (
    "Trying to backward through the loss a second time: its gradients were handed over. Call the model again"
)


@dataclass
class LossOutput(ModelOutput):
    """What a divided model returns for a batch with labels: the loss. The logits exist only in pieces, on different workers."""

    loss: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "logits":
            raise OptionError(
                "logits of a batch with labels: a model that is divided over workers does not keep them; "
                "call it without labels, under torch.no_grad(), for logits"
            )
        raise AttributeError(f"{type(self).__name__} has no {name}: it has the loss")


@dataclass
class LazyLogitsOutput(ModelOutput):
    """The loss; the model's other outputs, such as logits, are computed when somebody asks for them."""

    loss: torch.Tensor | None = None

    def with_lazy(self, compute: Callable[[], ModelOutput]) -> "LazyLogitsOutput":
        """Set what gives the model's outputs."""
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


def loss_with_computed_grads(loss: torch.Tensor, gradients: list[tuple[nn.Parameter, torch.Tensor]]) -> torch.Tensor:
    """The loss as a result of parameters whose gradients are computed already. They are used up by the backward pass."""
    parameters = [parameter for parameter, _ in gradients]
    loss_of_parameters: torch.Tensor = _Computed.apply(loss, [gradient for _, gradient in gradients], *parameters)  # type: ignore[no-untyped-call]
    return loss_of_parameters


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *scales: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(BACKWARD_TWICE_MESSAGE)
        if torch.is_grad_enabled():
            raise OptionError(
                "create_graph=True: the gradients of a batch with labels are computed in the call and have none themselves; "
                "call the model without labels for a loss of your own"
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = scales[0].item()
        if factor != 1.0:
            for gradient in gradients:
                gradient.mul_(factor)
        return None, None, *gradients
