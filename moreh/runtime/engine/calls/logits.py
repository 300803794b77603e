"""Logits of a whole batch on every rank, and the backward pass of a custom loss.

The forward pass of a call without labels, or of one whose logits are read, keeps few activations (kept_forwards.py).
`backward()` of the custom loss computes the gradient of the logits. Then a second pass of the plan's schedule, with the
same random numbers, computes the gradients of `(logits * gradient).sum()`.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moreh.errors import OptionError
from moreh.patches.module_call import inside_of_call
from moreh.runtime.batch.model_inputs import (
    LOGITS_TO_KEEP,
    ONE_WORKER,
    ModelInputs,
    kept_positions,
    pad_inputs,
    slice_rows,
)
from moreh.runtime.engine.calls.kept_forwards import KeptForwards
from moreh.runtime.engine.calls.output_layer import OutputLayer
from moreh.runtime.engine.calls.recorded import CHANGED_WEIGHTS_MESSAGE, mode_of
from moreh.runtime.engine.gradients import hand_over_grads, names_with_grads
from moreh.runtime.engine.parallel_model import ParallelModel, local_tensor
from moreh.runtime.pipeline.kept_passes import KeptPasses
from moreh.runtime.sharding.placement import stage_placements
from moreh.runtime.sharding.spec import shard_range
from moreh.trace import span

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Odd, so that different stages and micro-batches get different seeds.
_STAGE_STRIDE, _MICRO_BATCH_STRIDE = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


@dataclass(frozen=True)
class LogitsPasses:
    """Computes the logits of one model."""

    model: ParallelModel
    """The model."""
    vocabulary_size: int
    """Rows of its output layer."""
    sequence_multiple: int
    """The number that padded row lengths are a multiple of."""
    kept_forwards: KeptForwards
    """The forward passes that the second pass need not repeat."""
    forward: Callable[..., tuple[list[torch.Tensor], int | None]]
    """Computes the logits (on the last stage) and the seed of the random numbers, given micro-batches, and `with_seeds`
    if a second pass may follow."""
    second_pass: Callable[[list[ModelInputs], int, list[torch.Tensor]], dict[str, torch.Tensor]]
    """Computes gradients by parameter name, given micro-batches, the seed and the gradients of their logits."""
    output_layer: OutputLayer
    """The layer that the second pass needs no outputs of."""


class MicroBatchSeeds:
    """Seeds for each micro-batch and stage, so that two passes draw the same numbers in any order."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._stages_started: Counter[int] = Counter()

    def start_stage(self, micro_batch: int) -> None:
        """Seed for the next of this rank's stages that computes a micro-batch."""
        stage = self._stages_started[micro_batch]
        self._stages_started[micro_batch] += 1
        torch.manual_seed((self._seed + _STAGE_STRIDE * (stage + 1) + _MICRO_BATCH_STRIDE * (micro_batch + 1)) % 2**63)


def batch_logits(passes: LogitsPasses, inputs: ModelInputs) -> torch.Tensor:
    """The logits `[batch, sequence, vocabulary]` of a batch on every rank; collective.

    With gradients on they are a function of the parameters.

    Raises:
        OptionError: the script wants gradients of the inputs.
    """
    inputs = replace(inputs, labels=None)
    wants_grad = torch.is_grad_enabled() and any(p.requires_grad for p in passes.model.user_params.values())
    with span("logits"), torch.no_grad():
        if not wants_grad:
            return _logits_of_all_rows(passes, inputs)
        if any(tensor.requires_grad for tensor in inputs.tensors.values()):
            raise OptionError(
                "inputs with gradients, such as inputs_embeds from a module of the script's own: a model that is "
                f"sharded over workers gives none to its inputs; detach them, or {ONE_WORKER}"
            )
        micro_batches = _cut_rows(passes, inputs)
        with passes.output_layer.observed(), passes.kept_forwards.of_first_pass() as kept:
            outputs, seed = passes.forward(micro_batches, with_seeds=True)
        assert seed is not None
        logits = _whole_logits(passes, outputs, micro_batches)
        passes.kept_forwards.drop_if_memory_is_short(logits)
        logits = logits[: inputs.batch_size, : inputs.sequence_length]
    return _with_second_pass(logits, passes, inputs, seed, kept)[:, kept_positions(inputs)]


def _logits_of_all_rows(passes: LogitsPasses, inputs: ModelInputs) -> torch.Tensor:
    """Logits that no gradient is wanted of. Each data-parallel rank computes all rows."""
    model = passes.model
    kept = kept_positions(inputs)
    padded = pad_inputs(inputs, inputs.batch_size, passes.sequence_multiple)
    if model.plan.sequence_parallel:
        # The output layer sees a part of the positions only: they are chosen afterwards.
        padded = replace(padded, others={k: v for k, v in padded.others.items() if k != LOGITS_TO_KEEP})
    outputs, _ = passes.forward([slice_rows(padded, 0, padded.batch_size, model.mesh.device)], with_seeds=False)
    positions = torch.arange(padded.sequence_length, device=kept.device if isinstance(kept, torch.Tensor) else None)
    if not model.plan.sequence_parallel:
        positions = positions[kept]
    logits = _from_last_stage(passes, outputs[0] if outputs else None, (padded.batch_size, len(positions)))
    return logits[:, : inputs.sequence_length][:, kept] if model.plan.sequence_parallel else logits


def _cut_rows(passes: LogitsPasses, inputs: ModelInputs) -> list[ModelInputs]:
    """This rank's micro-batches of whole rows, in the order of the batch, on the device that computes them."""
    plan, mesh = passes.model.plan, passes.model.mesh
    inputs = replace(inputs, others={k: v for k, v in inputs.others.items() if k != LOGITS_TO_KEEP})
    rows_per_rank = -(-inputs.batch_size // plan.data)
    num_parts = plan.micro_batches if plan.pipeline > 1 else -(-rows_per_rank // plan.micro_batch_size)
    size = -(-rows_per_rank // num_parts)
    padded = pad_inputs(inputs, plan.data * num_parts * size, passes.sequence_multiple)
    first = mesh.rank("data") * num_parts * size
    starts = range(first, first + num_parts * size, size)
    return [slice_rows(padded, start, start + size, mesh.device) for start in starts]


def _from_last_stage(passes: LogitsPasses, logits: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
    """The logits `[*shape, vocabulary]` on every pipeline rank; the last stage's rank has them."""
    model = passes.model
    if model.plan.pipeline == 1:
        assert logits is not None
        return logits
    mesh = model.mesh
    last_rank = stage_placements(model.plan)[-1].pipeline_rank
    source = mesh.global_rank(last_rank, mesh.rank("data"), mesh.rank("tensor"))
    # Not always that of the parameters: under autocast it is another one, and some families cast their logits.
    dtype = torch.tensor(0 if logits is None else _DTYPES.index(logits.dtype), device=mesh.device)
    dist.broadcast(dtype, source, group=mesh.group("pipeline"))
    if logits is None:
        logits = torch.empty(*shape, passes.vocabulary_size, dtype=_DTYPES[int(dtype)], device=mesh.device)
    logits = logits.contiguous()
    with span("broadcast_logits", logits.nbytes):
        dist.broadcast(logits, source, group=mesh.group("pipeline"))
    return logits


def _whole_logits(passes: LogitsPasses, outputs: list[torch.Tensor], micro_batches: list[ModelInputs]) -> torch.Tensor:
    """The logits of all rows on every rank, padding included, from those of this rank's micro-batches."""
    model = passes.model
    rows = sum(micro_batch.batch_size for micro_batch in micro_batches)
    own = (torch.cat(outputs) if len(outputs) > 1 else outputs[0]) if outputs else None
    own = _from_last_stage(passes, own, (rows, micro_batches[0].sequence_length))
    if model.plan.data == 1:
        return own
    gathered = own.new_empty(model.plan.data * rows, *own.shape[1:])
    with span("all_gather_rows", gathered.nbytes):
        dist.all_gather_into_tensor(gathered, own.contiguous(), group=model.mesh.group("data"))
    return gathered


def _own_part(passes: LogitsPasses, grad: torch.Tensor, micro_batches: list[ModelInputs]) -> list[torch.Tensor]:
    """This rank's rows and part of the vocabulary of a gradient of the batch's logits, by micro-batch."""
    mesh = passes.model.mesh
    size, length = micro_batches[0].batch_size, micro_batches[0].sequence_length
    first = mesh.rank("data") * len(micro_batches) * size
    start, stop = shard_range(passes.vocabulary_size, mesh.size("tensor"), mesh.rank("tensor"))
    parts = []
    for row in range(first, first + len(micro_batches) * size, size):
        part = grad[row : row + size, :, start:stop]
        padding = (0, 0, 0, length - part.shape[1], 0, size - part.shape[0])
        parts.append(functional.pad(part, padding) if any(padding) else part)  # padding by nothing would copy
    return parts


def _with_second_pass(
    logits: torch.Tensor, passes: LogitsPasses, inputs: ModelInputs, seed: int, kept: KeptPasses
) -> torch.Tensor:
    """The logits as a function of the script's parameters; the backward pass is collective.

    Autograd keeps the inputs as long as a backward pass may come.
    """
    model = passes.model
    names = [name for name, parameter in model.user_params.items() if parameter.requires_grad]
    state = _State(
        passes,
        seed,
        kept,
        names,
        replace(inputs, tensors={}),
        list(inputs.tensors),
        weight_versions(model),
        mode_of(model.parts.root, model.mesh.device.type),
    )
    tensors = [tensor.detach() for tensor in inputs.tensors.values()]
    result: torch.Tensor = _Logits.apply(logits, state, tensors, *(model.user_params[name] for name in names))  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _State:
    """The data that the second pass needs besides the tensors of the call and the gradient of its logits."""

    passes: LogitsPasses
    seed: int
    """The seed of the first pass."""
    kept: KeptPasses
    """This rank's forward passes of the first pass that have graphs."""
    names: list[str]
    """The parameters that get gradients."""
    inputs: ModelInputs
    """The call's inputs without tensors."""
    input_names: list[str]
    """The names of the tensors."""
    versions: dict[str, tuple[int, int, int]]
    """The versions of the weights in the first pass."""
    as_in_call: Callable[[], AbstractContextManager[None]]
    """The mode and precision of the first pass."""


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, state: _State, tensors: list[torch.Tensor], *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.state = state
        ctx.save_for_backward(*tensors)
        # An alias that autograd does not know as a view: scripts may change logits in place.
        alias = logits.new_empty(0)
        return alias.set_(logits.untyped_storage(), logits.storage_offset(), logits.shape, logits.stride())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        state: _State = ctx.state
        model = state.passes.model
        tensors = dict(zip(state.input_names, ctx.saved_tensors, strict=True))
        # Only the ranks that hold a weight see some changes of it.
        has_changed = torch.tensor(float(weight_versions(model) != state.versions), device=model.mesh.device)
        model.mesh.all_reduce(has_changed)
        if has_changed:
            state.kept.take()
            raise RuntimeError(CHANGED_WEIGHTS_MESSAGE)
        micro_batches = _cut_rows(state.passes, replace(state.inputs, tensors=tensors))
        # The stages call the model in this backward pass.
        passes = state.passes
        with state.as_in_call(), inside_of_call(), passes.output_layer.without_outputs():
            parts = _own_part(passes, grad_outputs[0], micro_batches)
            with passes.kept_forwards.in_second_pass(state.kept):
                grads = passes.second_pass(micro_batches, state.seed, parts)
        computed = names_with_grads(model, grads)
        by_name = dict(zip(computed, hand_over_grads(model, {name: grads.get(name) for name in computed}), strict=True))
        return None, None, None, *(by_name.get(name) for name in state.names)


def weight_versions(model: ParallelModel) -> dict[str, tuple[int, int, int]]:
    """Numbers that differ once a weight has been changed, by the parameter's name.

    A change of a whole tensor counts for that tensor; a change of an alias, such as `p.data`, for the local part. With
    `p.data = ...`, the local part has another address.
    """
    local_parts = {name: local_tensor(p) for name, p in model.user_params.items()}
    return {
        name: (p._version, local_parts[name]._version, local_parts[name].data_ptr())
        for name, p in model.user_params.items()
    }
