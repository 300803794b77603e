"""Optimizers and gradient clipping of sharded models."""

import torch

from moreh.errors import OptionError
from moreh.runtime.engine.sharded.registry import runners_with
from moreh.runtime.engine.sharded.user_parameters import keep_state_sharded
from moreh.runtime.sharding.global_ops import total_norm
from moreh.runtime.sharding.global_tensor import GlobalTensor, GlobalView
from moreh.trace import span


def support_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Keep the state of an optimizer sharded, as the parameters are; refuse optimizers that are wrong on shards.

    Adafactor keeps means of rows and columns of whole matrices. L-BFGS takes dot products of all parameters together.

    Raises:
        OptionError: the optimizer is an L-BFGS or Adafactor of a sharded model.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    models = [runner.model for runner in runners_with(lambda parameter: id(parameter) in own)]
    if not models:
        return
    keep_state_sharded(optimizer)
    has_shards = any(model.plan.tensor > 1 or model.uses_fsdp for model in models)
    if isinstance(optimizer, torch.optim.LBFGS) and (has_shards or any(model.plan.pipeline > 1 for model in models)):
        raise OptionError("LBFGS looks at all parameters together, which are sharded over workers: use AdamW or SGD")
    if isinstance(optimizer, torch.optim.Adafactor) and has_shards:
        raise OptionError(
            "Adafactor looks at rows and columns of matrices, which are sharded over workers: use AdamW or SGD"
        )


def norm_over_ranks(grads: list[torch.Tensor], norm_type: float) -> torch.Tensor | None:
    """The norm of gradients over all ranks, in one message; None if none of them is of a sharded model."""
    ids = {id(grad) for grad in grads}
    runners = runners_with(lambda parameter: parameter.grad is not None and id(parameter.grad) in ids)
    meshes = [runner.model.mesh for runner in runners]
    meshes += [grad.global_layout.mesh for grad in grads if isinstance(grad, GlobalTensor)]
    if not meshes or not norm_type > 0:
        return None
    with span("clip_total_norm"):
        return total_norm([g.full_tensor() if isinstance(g, GlobalView) else g for g in grads], norm_type, meshes[0])
