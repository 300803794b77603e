"""Lets `clip_grad_norm_` and `get_total_norm` compute the norm of gradients that are sharded over ranks."""

from collections.abc import Callable
from typing import Any

import torch

from moreh.patches.patch import Patch

# Given gradients and the order of the norm, their total norm; None for gradients that the function knows nothing of.
TotalNorm = Callable[[list[torch.Tensor], float], torch.Tensor | None]

TOTAL_NORM = Patch(
    target="torch.nn.utils.clip_grad._get_total_norm",
    why="Gradients are clipped by the norm over all ranks, whatever list of parameters the script passes.",
    no_public_way="A script calls torch.nn.utils.clip_grad_norm_, which would compute the norm of each gradient "
    "with a separate message.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)
PUBLIC_TOTAL_NORM = Patch(
    target="torch.nn.utils.get_total_norm",
    why="The same function under its public name, which torch binds at import.",
    no_public_way=TOTAL_NORM.no_public_way,
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)

_functions: list[TotalNorm] = []


def on_total_norm(function: TotalNorm) -> None:
    """Ask a function first whenever the total norm of gradients is computed from now on.

    `clip_grad_norm_` looks the helper up by its name when it is called, so a script that has imported it already is
    served too. One that has imported `get_total_norm` by name is not.
    """
    for patch in (TOTAL_NORM, PUBLIC_TOTAL_NORM):
        if not patch.is_active:
            patch.install(_make_total_norm)
    _functions.append(function)


def _make_total_norm(original: Any) -> Any:
    def get_total_norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> torch.Tensor:
        gradients = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        norm = _ask(gradients, float(norm_type))
        if norm is None:
            unknown: torch.Tensor = original(gradients, norm_type, error_if_nonfinite, foreach)
            return unknown
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
                "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
                "`error_if_nonfinite=False`"
            )
        return norm

    return get_total_norm


def _ask(gradients: list[torch.Tensor], norm_type: float) -> torch.Tensor | None:
    for function in _functions:
        norm = function(gradients, norm_type)
        if norm is not None:
            return norm
    return None
