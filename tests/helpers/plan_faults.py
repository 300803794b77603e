"""Faults that a runtime could have, to show that the comparison finds them: each is a context in which the runtime has it."""

import contextlib
import time
from dataclasses import replace
from unittest import mock

import torch.distributed as dist

from moreh.runtime.engine import gradients
from moreh.runtime.engine import registry as divided_models
from moreh.runtime.engine.model_runner import ModelRunner
from moreh.runtime.engine.parallel_model import ParallelModel, local_tensor

_divide, _reduce, _cut = divided_models.shard_model, gradients._reduce, ModelRunner._cut
_hand_over, _total_norm = gradients.accumulate_grads, gradients.global_grad_norm


def no_tied_sum():
    """Each end of the pipeline trains its own copy of tied embeddings."""
    return mock.patch.object(gradients, "_reduce_tied_gradient", return_value=None)


def no_data_reduction():
    """Each data-parallel rank trains on its own rows."""
    return mock.patch.object(
        gradients, "_reduce", lambda model, given: _reduce(replace(model, plan=replace(model.plan, data=1)), given)
    )


def partial_gradient():
    """What tensor-parallel ranks compute of a shared parameter's gradient is taken for all of it."""
    return mock.patch.object(
        gradients, "_reduce", lambda model, given: _reduce(replace(model, partial_gradients=frozenset()), given)
    )


def mean_of_means():
    """Micro-batches count the same, however many tokens they have."""

    def cut(self, inputs, micro_batches):
        shape = _cut(self, inputs, micro_batches)
        parts = self.plan.data * len(self._micro_batches)
        self._micro_batches = [
            replace(one, loss_divisor=max(1, int((one.labels != -100).sum())) * parts) for one in self._micro_batches
        ]
        return shape

    return mock.patch.object(ModelRunner, "_cut", cut)


def stale_weights():
    """Weights that an evaluation has gathered are used for the next step."""
    return mock.patch.object(ParallelModel, "sharded_modules", return_value=[])


def ignored_scale():
    """The script's loss / 2 has no effect on the gradients, which Adam does not see."""
    return mock.patch.object(
        gradients, "accumulate_grads", lambda model, given, scale: _hand_over(model, given, scale / scale)
    )


def lost_accumulation():
    """The second call of a step replaces the gradients of the first."""

    def accumulate_grads(model, given, scale):
        for parameter in model.user_params.values():
            parameter.grad = None
        _hand_over(model, given, scale)

    return mock.patch.object(gradients, "accumulate_grads", accumulate_grads)


def norm_of_own_part():
    """Each rank clips by the norm of the gradients that it holds."""

    def global_grad_norm(model, given, norm_type):
        whole = _total_norm(model, given, norm_type)
        return sum(local_tensor(gradient).norm() ** 2 for gradient in given.values()) ** 0.5 + 0 * whole

    return mock.patch.object(divided_models, "global_grad_norm", global_grad_norm)


def no_end():
    """One rank never comes to its part."""

    def shard_model(root, plan):
        while dist.get_rank() == 0:
            time.sleep(1)
        return _divide(root, plan)

    return mock.patch.object(divided_models, "shard_model", shard_model)


def old_parameters():
    """The optimizer goes on with the parameters that the model had before."""
    return mock.patch.object(divided_models, "replace_params")


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
    "old-parameters": old_parameters,
    "no-end": no_end,
}
