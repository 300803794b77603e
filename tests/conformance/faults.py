"""Faults that the runtime once had without a word, each put back: the pattern beside it has to come out otherwise.

They are those of scripts that nobody warned. `python -m tests.conformance --only PATTERN` runs a pattern without them.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Fault:
    """Something wrong with the runtime, and who sees it."""

    pattern: str
    """The name of the pattern that comes out otherwise."""
    plan: str
    """The plan that the workers carry out; "" for one worker."""
    attributes: dict[str, Any]
    """By the dotted names of attributes, what is there instead."""
    attempts: int = 1
    """Runs of which one must see the fault: more than one where it depends on the timing of threads."""


def put_back(name: str) -> None:
    """Give this process the fault, for good."""
    for target, broken in FAULTS[name].attributes.items():
        mock.patch(target, broken).start()


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of a function that checks or keeps something."""


def _same(first: Any, *_: Any) -> Any:
    return first


def _yes(*_: Any, **__: Any) -> bool:
    return True


@contextlib.contextmanager
def _grads_of_earlier_calls_are_lost_by_an_error(model: Any) -> Iterator[None]:
    earlier = [(parameter, parameter.grad) for parameter in model.compute_params.values()]
    for parameter, _ in earlier:
        parameter.grad = None
    yield
    for parameter, grad in earlier:
        parameter.grad = grad


@contextlib.contextmanager
def _always_alone(*_: Any, **__: Any) -> Iterator[bool]:
    yield True


def _own_number_only(value: Any, mesh: Any) -> list[Any]:
    return [value]


def _own_part_in_zeros(layout: Any, local: Any) -> Any:
    """What a rank makes of its part that does not ask the others."""
    import torch

    full = torch.zeros(layout.shape, dtype=local.dtype)
    full.view(-1)[: local.numel()] = local.reshape(-1)
    return full


def _past_autograd(model: Any, grads: dict[str, Any], scale: float = 1.0) -> list[None]:
    """Gradients are added to the parameters themselves: no hook and no `inputs=...` hears of them."""
    from moreh.runtime.engine.parallel_model import local_tensor
    from moreh.runtime.sharding.user_view import as_user_grad

    for name, grad in grads.items():
        parameter = model.user_params[name]
        local = None if grad is None else local_tensor(grad) * scale
        user = as_user_grad(local, parameter)
        parameter.grad = user if parameter.grad is None else parameter.grad + user
    return [None] * len(grads)


def _norm_of_own_part(grads: list[Any], norm_type: float, mesh: Any) -> Any:
    from moreh.runtime.engine.parallel_model import local_tensor

    return sum(local_tensor(grad).norm() ** 2 for grad in grads) ** 0.5


def _data_is_ignored(self: Any, value: Any) -> None:
    """`p.data = ...` sets what no worker computes with."""


def _own_input_gradient(entry: Any, mesh: Any) -> Any:
    import torch

    return torch.zeros_like(entry.leaf) if entry.leaf.grad is None else entry.leaf.grad


_ENGINE, _MODELS, _SHARDING = "moreh.runtime.engine", "moreh.models", "moreh.runtime.sharding"
_FUNCTIONS_ARE_TAKEN_FOR_STOCK = {
    f"{_MODELS}.library_functions._is_own": _yes,
    f"{_MODELS}.provenance.is_library_function": _yes,
}
FAULTS = {
    # On one worker.
    "fused Adam ignores strides": Fault(
        "adamw-strided-gradient", "", {"moreh.runtime.kernels.fused_adam._lie_alike": _yes}
    ),
    "an error loses the gradients before it": Fault(
        "wrong-id-in-accumulation",
        "",
        {
            f"{_ENGINE}.model_runner.without_earlier_grads": _grads_of_earlier_calls_are_lost_by_an_error,
            # Else torch's own forward pass raises the error.
            f"{_ENGINE}.fast_path.has_wrong_ids": lambda causal, inputs: False,
        },
    ),
    "replaced functions are ignored": Fault("loss-function-replaced", "", _FUNCTIONS_ARE_TAKEN_FOR_STOCK),
    "replaced forward passes see packed rows": Fault("forward-of-a-class-replaced", "", _FUNCTIONS_ARE_TAKEN_FOR_STOCK),
    "hooks on modules see packed rows": Fault(
        "loss-of-hooked-features", "", {f"{_MODELS}.known_computation.KnownComputation._find_hook": _nothing}
    ),
    "threads exchange each other's modules": Fault(
        "threads", "", {"moreh.threads.CallThreads.alone": _always_alone}, attempts=20
    ),
    "accumulation nodes are run by the call": Fault(
        "accumulation-node-hooks", "", {f"{_MODELS}.known_computation.has_node_hooks": lambda parameters: False}
    ),
    # On several workers.
    "reductions are of the rank's part": Fault(
        "gradient-norms-by-parameter", "tp2", {f"{_SHARDING}.global_ops._over_ranks": _own_number_only}
    ),
    "assigned data is ignored": Fault(
        "data-assigned",
        "tp2",
        {f"{_SHARDING}.global_classes.GlobalTensor.data": property(lambda self: self.detach(), _data_is_ignored)},
    ),
    "half of a parameter is saved": Fault(
        "parameters-saved",
        "tp2",
        {
            f"{_SHARDING}.global_classes.WholeTensor.__reduce_ex__": lambda self, version: self.local.__reduce_ex__(
                version
            )
        },
    ),
    "gradients are clipped by the norm of a stage": Fault(
        "clipping-with-another-parameter", "pp2", {f"{_ENGINE}.sharded.optimizers.total_norm": _norm_of_own_part}
    ),
    "gradients from before the first call are lost": Fault(
        "gradients-from-before-the-first-call", "tp2", {f"{_ENGINE}.sharded.shard_model.keep_earlier_grads": _nothing}
    ),
    "hooks on parameters never run": Fault(
        "parameter-hook-after-the-first-step", "tp2", {f"{_ENGINE}.gradients.hand_over_grads": _past_autograd}
    ),
    "the inputs of a backward pass are ignored": Fault(
        "backward-of-chosen-parameters", "pp2", {f"{_ENGINE}.gradients.hand_over_grads": _past_autograd}
    ),
    "modules that are put in are ignored": Fault(
        "module-put-in-after-a-step", "pp2", {f"{_ENGINE}.sharded.call.check_structure": _nothing}
    ),
    "functions that are replaced later are not": Fault(
        "mask-function-replaced", "dp2", {f"{_ENGINE}.sharded.call.check_functions": lambda root, expected: expected}
    ),
    "hooks on all modules see parts of the batch": Fault(
        "hook-of-all-modules", "pp2", {f"{_ENGINE}.calls.checks._has_any_global_hook": lambda: False}
    ),
    "the gradient of inputs is a rank's": Fault(
        "soft-prompt", "dp2", {f"{_ENGINE}.model_runner.reduced_grad": _own_input_gradient}
    ),
    "averages by hand are of a rank's part": Fault(
        "ema-by-hand", "pp2", {f"{_SHARDING}.global_layout.GlobalLayout.gather": _own_part_in_zeros}
    ),
    "each training call draws a random number": Fault(
        "unseeded-shuffle", "dp2", {f"{_ENGINE}.model_runner.draws_random_numbers": _yes}
    ),
    "lines are appended by each worker": Fault(
        "lines-appended-to-a-file", "dp2", {f"{_ENGINE}.multi_worker_hook.share_script_files": _nothing}
    ),
}
