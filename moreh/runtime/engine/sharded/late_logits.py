"""The logits of a sharded model's call with labels, computed when the script reads them."""

import weakref
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from moreh.errors import OptionError
from moreh.patches.module_call import inside_of_call
from moreh.runtime.batch.model_inputs import ModelInputs
from moreh.runtime.engine.calls.history import CallHistory
from moreh.runtime.engine.calls.logits import weight_versions
from moreh.runtime.engine.calls.recorded import mode_of, version_of
from moreh.runtime.engine.calls.unread import CHANGED_SINCE_CALL, keep_weights_at_steps, stop_keeping_weights
from moreh.runtime.engine.model_runner import ModelRunner
from moreh.runtime.engine.parallel_model import local_tensor
from moreh.runtime.kernels.allocator import free_bytes

# The copies take at most this share of the memory that is free before an optimizer's step.
_SHARE_OF_FREE_MEMORY = 0.5
_last_calls: weakref.WeakKeyDictionary[nn.Module, "weakref.ref[LateLogits]"] = weakref.WeakKeyDictionary()


class LateLogits:
    """The logits of one call, in the modes of the call.

    Before the first optimizer's step of a model, the last call before it keeps a copy of this rank's weights. A script
    that reads logits after each step reads those of the first step too, and from then on the model's own forward pass
    gives them. Later steps copy nothing.
    """

    def __init__(self, runner: ModelRunner, inputs: ModelInputs, history: CallHistory, cache: dict[str, Any]) -> None:
        model = runner.model
        self._runner, self._inputs, self._history, self._cache = runner, inputs, history, cache
        self._as_in_call = mode_of(model.parts.root, model.mesh.device.type)
        self._with_grads = torch.is_grad_enabled()
        self._weight_versions = weight_versions(model)
        self._input_versions = _input_versions(inputs)
        self._weights_before_step: dict[str, torch.Tensor] = {}
        last_call = _last_calls.pop(model.parts.root, None)
        if last_call is not None and (late_logits := last_call()) is not None:
            late_logits._drop_weights()
        _last_calls[model.parts.root] = weakref.ref(self)
        if not history.has_kept_weights:
            keep_weights_at_steps(self)

    def compute(self) -> CausalLMOutputWithPast:
        """The logits; collective. The script's random generator continues from its state after the call.

        After an optimizer's step they have no gradients, as in torch, where the backward pass has used them up.

        Raises:
            OptionError: weights or inputs have changed since the call, and the weights were not kept.
        """
        has_changed = self._check_weights()
        self._history.add_read(late=has_changed)
        stop_keeping_weights(self)
        with_grads = self._with_grads and not has_changed
        # The stages call the model outside a call of the script.
        with inside_of_call(), torch.random.fork_rng([]), self._as_in_call(), torch.set_grad_enabled(with_grads):
            self._exchange_weights()
            try:
                return CausalLMOutputWithPast(logits=self._runner.logits(self._inputs), **self._cache)
            finally:
                self._exchange_weights()

    def keep_weights(self, changing: set[int]) -> None:
        """Copy this rank's part of the weights with these ids, before they are changed, where memory is free."""
        model = self._runner.model
        if changing.isdisjoint(map(id, model.user_params.values())):
            return  # the step of another model
        versions = weight_versions(model)
        parts = {
            name: local_tensor(model.user_params[name]).detach()
            for name in model.compute_params
            if id(model.user_params[name]) in changing and versions[name] == self._weight_versions[name]
        }
        if sum(part.nbytes for part in parts.values()) <= _SHARE_OF_FREE_MEMORY * free_bytes(model.mesh.device):
            self._weights_before_step.update({name: part.clone() for name, part in parts.items()})
            self._history.has_kept_weights = True

    def _drop_weights(self) -> None:
        stop_keeping_weights(self)
        self._weights_before_step = {}

    def _changed_weights(self) -> set[str]:
        now = weight_versions(self._runner.model)
        return {name for name, version in self._weight_versions.items() if now[name] != version}

    def _check_weights(self) -> bool:
        """True if weights have changed since the call; collective, because only its holders see some changes of one.

        Raises:
            OptionError: a rank lacks weights or inputs of the call.
        """
        model, changed = self._runner.model, self._changed_weights()
        missing = (changed & model.compute_params.keys()) - self._weights_before_step.keys()
        cannot = bool(missing) or self._input_versions != _input_versions(self._inputs)
        ranks = torch.tensor([float(bool(changed)), float(cannot)], device=model.mesh.device)
        model.mesh.all_reduce(ranks)
        ranks_that_changed, ranks_that_cannot = ranks.tolist()
        if ranks_that_cannot:
            raise OptionError(CHANGED_SINCE_CALL)
        return ranks_that_changed > 0

    def _exchange_weights(self) -> None:
        """Exchange the model's weights with those that were kept, without a trace in their versions."""
        for name, kept in self._weights_before_step.items():
            part = local_tensor(self._runner.model.user_params[name]).data
            now = part.clone()
            part.copy_(kept)
            kept.copy_(now)


def _input_versions(inputs: ModelInputs) -> list[int]:
    return [version_of(tensor) for tensor in inputs.tensors.values()]
