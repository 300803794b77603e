"""Faults that a runtime could have, each a context in which it has the fault: comparisons must find them."""

import contextlib
import itertools
import time
from dataclasses import replace
from unittest import mock

import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState

from moreh.runtime.batch.batch_cutter import BatchCutter
from moreh.runtime.engine import gradients, model_runner
from moreh.runtime.engine.parallel_model import ParallelModel, local_tensor
from moreh.runtime.engine.sharded import optimizers, shard_model
from tests.helpers.plans.cases import CALLS

_cut = BatchCutter.cut
_reduce, _hand_over_grads, _total_norm = gradients._reduce, gradients.hand_over_grads, optimizers.total_norm
_shard_model = shard_model.shard_model
_fsdp_modules, _install_compute_params = ParallelModel.fsdp_modules, model_runner.install_compute_params


def no_tied_sum():
    """Each end of the pipeline trains its own copy of tied embeddings."""
    return mock.patch.object(gradients, "_reduce_tied_grad", return_value=None)


def no_data_reduction():
    """Each data-parallel rank trains on its own rows."""
    return mock.patch.object(
        gradients, "_reduce", lambda model, grads: _reduce(replace(model, plan=replace(model.plan, data=1)), grads)
    )


def partial_gradient():
    """The part of a shared parameter's gradient that a tensor-parallel rank computes is taken for all of it."""
    return mock.patch.object(
        gradients, "_reduce", lambda model, grads: _reduce(replace(model, partial_grads=frozenset()), grads)
    )


def mean_of_means():
    """Micro-batches count the same, however many tokens they have."""

    def cut(self, inputs, num_micro_batches, max_tokens):
        micro_batches = _cut(self, inputs, num_micro_batches, max_tokens)
        parts = self.plan.data * len(micro_batches)
        return [replace(m, loss_divisor=max(1, int((m.labels != -100).sum())) * parts) for m in micro_batches]

    return mock.patch.object(BatchCutter, "cut", cut)


def stale_weights():
    """Weights that an evaluation has gathered are used for the next step."""

    def install_compute_params(model):
        _install_compute_params(model)
        for module in _fsdp_modules(model):
            group = module._get_fsdp_state()._fsdp_param_group
            for parameter in group.fsdp_params if group else ():
                if parameter.sharded_state == ShardedState.UNSHARDED:
                    parameter._setattr_on_modules(parameter._unsharded_param)

    faults = contextlib.ExitStack()
    faults.enter_context(mock.patch.object(model_runner, "install_compute_params", install_compute_params))
    faults.enter_context(mock.patch.object(ParallelModel, "fsdp_modules", return_value=[]))
    return faults


def ignored_scale():
    """The script's loss / 2 has no effect on the gradients, which Adam does not see."""
    return mock.patch.object(
        gradients,
        "hand_over_grads",
        lambda model, grads, grad_output: _hand_over_grads(model, grads, grad_output / grad_output),
    )


def lost_accumulation():
    """The second call of a step replaces the gradients of the first."""

    def hand_over_grads(model, grads, grad_output):
        for parameter in model.user_params.values():
            parameter.grad = None
        return _hand_over_grads(model, grads, grad_output)

    return mock.patch.object(gradients, "hand_over_grads", hand_over_grads)


def norm_of_own_part():
    """Each rank clips by the norm of the gradients that it holds."""

    def total_norm(grads, norm_type, mesh):
        whole = _total_norm(grads, norm_type, mesh)
        return sum(local_tensor(grad).norm() ** 2 for grad in grads) ** 0.5 + 0 * whole

    return mock.patch.object(optimizers, "total_norm", total_norm)


def not_a_number():
    """After the first step, the gradient of one matrix is NaN on the last rank."""
    calls = itertools.count()

    def hand_over_grads(model, grads, grad_output):
        handed_over = _hand_over_grads(model, grads, grad_output)
        if next(calls) >= CALLS[0] and dist.get_rank() == dist.get_world_size() - 1:
            # No tied one: its gradient counts in the norm on another stage.
            is_alone = {n: len(spec.pipeline_ranks) == 1 and len(spec.shape) == 2 for n, spec in model.specs.items()}
            index = next(i for i, n in enumerate(grads) if is_alone[n] and grads[n] is not None)
            local_tensor(handed_over[index]).fill_(float("nan"))
        return handed_over

    return mock.patch.object(gradients, "hand_over_grads", hand_over_grads)


def no_end():
    """One rank never comes to its part."""

    def wait_on_first_rank(root, plan):
        while dist.get_rank() == 0:
            time.sleep(1)
        return _shard_model(root, plan)

    return mock.patch.object(shard_model, "shard_model", wait_on_first_rank)


def old_parameters():
    """The optimizer goes on with the parameters that the model had before."""
    return mock.patch.object(shard_model, "replace_params")


FAULTS = {
    None: contextlib.nullcontext,
    "no-tied-sum": no_tied_sum,
    "no-data-reduction": no_data_reduction,
    "partial-gradient": partial_gradient,
    "mean-of-means": mean_of_means,
    "stale-weights": stale_weights,
    "ignored-scale": ignored_scale,
    "lost-accumulation": lost_accumulation,
    "norm-of-own-part": norm_of_own_part,
    "not-a-number": not_a_number,
    "old-parameters": old_parameters,
    "no-end": no_end,
}
