"""The output of a batch with labels: the model's own output class, with all but the loss computed lazily.

The loss is there at once. The first access to anything else computes the rest; from then on the object is of the
model's class itself, so that it is compared, copied, pickled and sliced as transformers' outputs are.
"""

import inspect
import typing
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

BACKWARD_TWICE_MESSAGE = (
    "Trying to backward through the loss a second time: on several workers its gradients are handed over once, with "
    "retain_graph=True as well. Add losses up before backward(), make a loss of outputs.logits, or call the model again"
)
# Fields that a model fills only where the call asks for it, and the runtime takes no such calls.
_ABSENT = frozenset(("hidden_states", "attentions", "cross_attentions", "router_logits", "aux_loss", "z_loss"))


def printed_as_loss(loss: torch.Tensor) -> torch.Tensor:
    """A loss of an autograd function of this package, printed with the name that torch gives a cross-entropy's node."""
    if loss.grad_fn is not None:
        type(loss.grad_fn).__name__ = "NllLossBackward0"
    return loss


def output_class_of(causal: Any) -> type[ModelOutput]:
    """The class of outputs that a model of transformers returns, by the annotation of its forward pass.

    `CausalLMOutputWithPast` where the annotation names no class with a loss and logits.
    """
    return _annotated_class(type(causal).forward)


@lru_cache(maxsize=64)
def _annotated_class(forward: Callable[..., Any]) -> type[ModelOutput]:
    try:
        annotation = inspect.signature(forward, eval_str=True).return_annotation
    except (NameError, TypeError, ValueError):
        return CausalLMOutputWithPast
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, ModelOutput):
            fields = getattr(candidate, "__dataclass_fields__", {})
            if "loss" in fields and "logits" in fields:
                return candidate
    return CausalLMOutputWithPast


def with_lazy_outputs(
    output_class: type[ModelOutput], loss: torch.Tensor, compute: Callable[[], ModelOutput]
) -> ModelOutput:
    """Outputs of a class with a loss; `compute` makes the others when one of them is asked for, once."""
    outputs: Any = output_class(loss=loss)
    lazy_class = _lazy_class(output_class)
    for name in lazy_class._later:
        del outputs.__dict__[name]
    outputs.__dict__["_compute"] = compute
    outputs.__class__ = lazy_class
    return outputs


@lru_cache(maxsize=64)
def _lazy_class(output_class: type[ModelOutput]) -> type[Any]:
    names = {"__module__": output_class.__module__, "__qualname__": output_class.__qualname__}
    lazy: Any = type(output_class.__name__, (LazyOutput, output_class), names)
    fields: dict[str, Any] = getattr(output_class, "__dataclass_fields__", {})
    lazy._later = frozenset(fields) - _ABSENT - {"loss"}
    lazy._complete_class = output_class
    return lazy


class LazyOutput:
    """A mixin for classes of outputs: computes missing outputs when they are accessed.

    `dict.items(outputs)` gives what there is already.
    """

    _later: frozenset[str]
    """The fields that are computed later."""
    _complete_class: type[ModelOutput]
    """The class of the object once it is complete."""
    _compute: Callable[[], ModelOutput]
    """Computes the missing outputs, with or without the loss."""
    loss: torch.Tensor
    """The mean loss over the label tokens of the batch, a scalar."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new object, which a script makes with `type(outputs)(...)`, is complete."""
        return cls._complete_class(*args, **kwargs)

    def change_later(self, change: Callable[[Any], Any]) -> None:
        """Let `change` be applied to the outputs that are computed later."""
        compute = self._compute
        object.__setattr__(self, "_compute", lambda: change(compute()))

    def _complete(self) -> Any:
        """Compute the missing outputs, and become an object of the model's class."""
        computed = self._compute()  # may raise, now and again the next time
        object.__delattr__(self, "_compute")
        self.__class__ = self._complete_class  # type: ignore[assignment]
        outputs: Any = self
        for name, value in computed.items():
            if name != "loss":
                outputs[name] = value
        return outputs

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name not in type(self)._later:
            return super().__getattribute__(name)
        return getattr(self._complete(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss" and value is not None:
            dict.__setitem__(self, name, value)  # type: ignore[index]
        if name in ("loss", "__class__"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._complete(), name, value)

    def __getitem__(self, key: Any) -> Any:
        if key in ("loss", 0) if isinstance(key, str | int) else False:
            return self.loss
        return self._complete()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if key == "loss":
            self.loss = value
        else:
            self._complete()[key] = value

    def __contains__(self, key: object) -> bool:
        if key in ("loss", "logits"):
            return True
        return key in type(self)._later and key in self._complete()

    def get(self, key: str, default: Any = None) -> Any:
        """The output with a name, or a default without one."""
        if key in self:
            return self[key]
        return default

    def __iter__(self) -> Iterator[str]:
        return iter(self._complete())

    def __len__(self) -> int:
        return len(self._complete())

    def __eq__(self, other: object) -> bool:
        return bool(self._complete() == other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._complete())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._complete().__reduce_ex__(protocol)

    def to_tuple(self) -> tuple[Any, ...]:
        """All outputs in the order of the fields."""
        return self._complete().to_tuple()

    def keys(self) -> Any:
        """The names of all outputs."""
        return self._complete().keys()

    def items(self) -> Any:
        """All outputs with their names."""
        return self._complete().items()

    def values(self) -> Any:
        """All outputs."""
        return self._complete().values()

    def copy(self) -> Any:
        """A copy, as of a dictionary."""
        return self._complete().copy()
