"""A recorded call that can be repeated: its arguments, random states, precision and weights."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from moreh.errors import OptionError
from moreh.models.adapters import AdapterState
from moreh.patches.module_call import inside_of_call
from moreh.runtime.engine.calls.unread import CHANGED_SINCE_CALL, stop_keeping_weights
from moreh.threads import CALL_THREADS

# Of each call: a few microseconds for each parameter.
_SAMPLED_PARAMETERS, _SAMPLED_ELEMENTS = 16, 8
CHANGED_WEIGHTS_MESSAGE = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: the weights or "
    "inputs have changed since the call that made this loss"
)


def mode_of(module: nn.Module, kind: str) -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts that compute as now: in the module's mode, with its adapters, and with a device's autocast."""
    is_training, adapters = module.training, AdapterState(module)
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    @contextmanager
    def as_then() -> Iterator[None]:
        changed = [] if module.training == is_training else [(inner, inner.training) for inner in module.modules()]
        try:
            if changed:
                module.train(is_training)
            with adapters.restored(), torch.autocast(kind, dtype=dtype, enabled=enabled):
                yield
        finally:
            for inner, was_training in changed:
                inner.training = was_training

    return as_then


class RecordedCall:
    """A call of a model on one worker."""

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        computes_the_same: Callable[[], bool] = lambda: True,
    ) -> None:
        """`parameters` are those of the module, by name; `computes_the_same` is True until the script changes modules,
        functions or hooks."""
        self._module, self._computes_the_same = module, computes_the_same
        self.thread = threading.current_thread()
        leaves, self._structure = tree_flatten((args, kwargs))
        self.tensors = [kept(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._others = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
        self._device = next(iter(parameters.values())).device
        self._as_in_call, self._grad = mode_of(module, self._device.type), torch.is_grad_enabled()
        self._rng = [torch.get_rng_state()]
        if self._device.type == "cuda":
            self._rng.append(torch.cuda.get_rng_state(self._device))
        self._weights_before_step: dict[str, torch.Tensor] = {}
        self._input_versions = [version_of(tensor) for tensor in self.tensors]
        self._weights = {name: (id(parameter), version_of(parameter)) for name, parameter in parameters.items()}
        self._samples = _samples(parameters)

    def arguments(self, tensors: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> tuple[tuple[Any, ...], Any]:
        """The arguments of the call, with `tensors` in the place of its own."""
        remaining = iter(tensors)
        leaves = [next(remaining) if other is None else other[0] for other in self._others]
        args, kwargs = tree_unflatten(leaves, self._structure)
        return args, kwargs

    def take_tensors(self) -> list[torch.Tensor]:
        """The inputs, which are not kept here any longer."""
        tensors, self.tensors = self.tensors, []
        return tensors

    @property
    def has_changed(self) -> bool:
        """True if a weight has been changed since the call, in place or through an alias such as `p.data`."""
        return bool(self._weights_with_other_versions() or self._weights_with_other_elements())

    def check_unchanged(self) -> None:
        """Check that the call would give the same now.

        Raises:
            OptionError: modules, functions or hooks of the model have changed, or a weight through an alias.
            RuntimeError: a weight has been changed in place.
        """
        if self._weights_with_other_versions():
            raise RuntimeError(CHANGED_WEIGHTS_MESSAGE)
        if changed := self._weights_with_other_elements():
            raise OptionError(
                f"{min(changed)} has changed since the call that made this loss, through p.data or another alias, and "
                "the gradients of the loss are computed now: call backward() before the change"
            )
        if not self._computes_the_same():
            raise OptionError(
                "modules, functions or hooks of the model have changed since the call that made this loss, whose "
                "gradients are computed now: call backward() before the change"
            )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Compute as in the call: with its random numbers, precision and mode. The script's own come back."""
        is_cuda = self._device.type == "cuda"
        with torch.random.fork_rng([self._device] if is_cuda else []):
            torch.set_rng_state(self._rng[0])
            if is_cuda:
                torch.cuda.set_rng_state(self._rng[1], self._device)
            with self._as_in_call(), torch.set_grad_enabled(self._grad):
                yield

    def own_forward(self, tensors: list[torch.Tensor] | tuple[torch.Tensor, ...], **changes: Any) -> Any:
        """The outputs of the model's own forward pass for the call, with some of its arguments changed."""
        args, kwargs = self.arguments(tensors)
        with self._in_own_forward():
            return self._module(*args, **{**kwargs, **changes})

    def own_gradients(
        self, tensors: tuple[torch.Tensor, ...], parameters: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """The gradients of the loss that the model's own forward pass gives for the call."""
        loss = self.own_forward(tensors).loss
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    def outputs_beside_the_loss(self, tensors: list[torch.Tensor]) -> Any:
        """The outputs of the model's own forward pass without labels, with gradients if the call was made with them.

        After an optimizer's step there are no gradients, as in torch, where the backward pass has used them up.

        Raises:
            OptionError: inputs, weights or the model's computation have been changed.
        """
        changed = self._weights_with_other_versions() - self._weights_before_step.keys()
        changed |= self._weights_with_other_elements()
        if (
            changed
            or not self._computes_the_same()
            or self._input_versions != [version_of(tensor) for tensor in tensors]
        ):
            raise OptionError(CHANGED_SINCE_CALL)
        stop_keeping_weights(self)
        if not self._weights_before_step:
            return self.own_forward(tensors, labels=None)
        args, kwargs = self.arguments(tensors)
        with self._in_own_forward(), torch.no_grad():
            kwargs = {**kwargs, "labels": None}
            return torch.func.functional_call(self._module, self._weights_before_step, args, kwargs)

    @contextmanager
    def _in_own_forward(self) -> Iterator[None]:
        """Compute as in the call, by the model's own forward pass, while no other thread exchanges its modules."""
        with CALL_THREADS.call(with_grad=self._grad, thread=self.thread), self.restored(), inside_of_call():
            yield

    def drop_kept_weights(self) -> None:
        """Free the weights that were kept: another call of the model has begun."""
        stop_keeping_weights(self)
        self._weights_before_step = {}

    def keep_weights(self, changing: set[int]) -> None:
        """Copy the weights with these ids, before they are changed."""
        for name, parameter in self._module.named_parameters():
            is_as_in_call = self._weights.get(name) == (id(parameter), version_of(parameter))
            if id(parameter) in changing and is_as_in_call:
                self._weights_before_step[name] = parameter.detach().clone()

    def _weights_with_other_elements(self) -> set[str]:
        """Sampled parameters that are not as in the call, nor were so when they were kept."""
        now: dict[str, torch.Tensor] = {**dict(self._module.named_parameters()), **self._weights_before_step}
        is_same = {
            name: name in now and torch.equal(_sample(now[name]), sample) for name, sample in self._samples.items()
        }
        return {name for name, same in is_same.items() if not same}

    def _weights_with_other_versions(self) -> set[str]:
        now = {name: (id(parameter), version_of(parameter)) for name, parameter in self._module.named_parameters()}
        return {name for name, weight in self._weights.items() if now.get(name) != weight}


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """An input as it is now, for a later computation: a script may fill the same ids, mask or labels again.

    Of a tensor with more than two dimensions, such as a mask with a row per query, the tensor itself. Autograd finds
    that it was changed.
    """
    return tensor.clone() if tensor.dim() <= 2 else tensor


def version_of(tensor: torch.Tensor) -> int:
    """A number that grows when a tensor is changed in place; tensors of `inference_mode` have none."""
    return -1 if tensor.is_inference() else tensor._version


def _samples(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of some elements of some parameters: no version tells of changes through `p.data`, NumPy and the like.

    Scripts with a step by hand change all elements of all parameters that they train.
    """
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    names = list(trained)[:: max(1, len(trained) // _SAMPLED_PARAMETERS)]
    return {name: _sample(trained[name]) for name in names}


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """The bytes of some elements: unlike numbers, those of a NaN are equal to themselves."""
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLED_ELEMENTS)].clone().view(torch.uint8)
