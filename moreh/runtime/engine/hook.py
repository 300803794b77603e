"""The hook around calls of models on one worker: the plan, mixed precision, and activation recomputation.

The hook is not attached to a model. It applies to all models, including copies and submodules called on their own,
whenever they were created. `moreh/patches/module_call.py` passes each call to it; `FastPath` computes batches with
labels.
"""

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from moreh.accelerator.flavors import Flavor
from moreh.accelerator.job import LocalJob, local_job
from moreh.accelerator.memory.out_of_memory import nothing_fits_error
from moreh.errors import PlanError
from moreh.log import logger
from moreh.models.describe.from_module import describe_module
from moreh.options import ParallelOptions, PlannerVariables
from moreh.patches.module_call import around_model_calls, first_parameter, instead_of_model_calls
from moreh.patches.optimizer_creation import on_optimizer_created
from moreh.planner.plan.plan import Training
from moreh.planner.report.chosen_plan import flavor_plan, local_device, local_plan, memory_text
from moreh.planner.search.constraints import constraints_from_options
from moreh.planner.units import seconds_text
from moreh.runtime.engine.choose_plan import Selection, predicted_use, select_local_plan, select_plan
from moreh.runtime.engine.optimizer_in_use import optimizer_in_use
from moreh.runtime.kernels.allocator import before_own_forward
from moreh.runtime.kernels.fused_adam import use_fused_kernels
from moreh.runtime.kernels.precision import autocast_if, choose_bfloat16, in_float32, inside_autocast
from moreh.runtime.kernels.recomputation import recompute_activations
from moreh.runtime.launch.world import current_world
from moreh.runtime.sharding.local_weights import has_half_weights
from moreh.threads import CALL_THREADS
from moreh.trace import span

if TYPE_CHECKING:
    from moreh.runtime.engine.fast_path import FastPath

# Maximum number of tokens per micro-batch in an evaluation before the first training batch.
UNPLANNED_TOKENS = 1024
# Below this number of FLOPs per batch, padding included, cutting and packing cost as much time as they save.
MIN_FLOPS = 2e9


class SingleWorkerHook:
    """The hook of a single worker: its options, and the state of each model that it has seen."""

    def __init__(self, options: ParallelOptions, variables: PlannerVariables, job: LocalJob) -> None:
        self.options = options
        self.variables = variables
        self.job = job
        self._prepared: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        # Tokens of the largest batch that each model was planned for.
        self._planned_tokens: weakref.WeakKeyDictionary[torch.nn.Module, float] = weakref.WeakKeyDictionary()
        self._micro_batch_tokens: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
        self._flops_per_token: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
        # Whether bfloat16 was chosen for a device.
        self._bfloat16_by_device: dict[torch.device, bool] = {}
        # For each thread: whether its current call computes in bfloat16.
        self._threads = threading.local()
        self._fast_path: FastPath | None = None

    @contextmanager
    def around_call(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """The context of a call: prepares and plans the model if needed, and sets the precision.

        A model is prepared before its first call. It is planned before its first training batch, and again before a
        larger batch.
        """
        with CALL_THREADS.call(with_grad=torch.is_grad_enabled()), self._prepare_call(model, args, kwargs):
            yield

    def _prepare_call(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[object]:
        """Prepare and plan the model if needed; returns the autocast context of the call."""
        if model not in self._prepared:
            self._prepare(model)
            self._prepared.add(model)
        parameter = first_parameter(model)
        assert parameter is not None
        # A model in another dtype, or under the script's own autocast, keeps its precision.
        bfloat16 = parameter.dtype == torch.float32 and not inside_autocast() and self._uses_bfloat16(parameter.device)
        if _trains(model, kwargs) and not parameter.is_meta:
            shape = _tokens_shape(args, kwargs)
            if shape is not None and shape[0] * shape[1] > self._planned_tokens.get(model, 0):
                with span("choose_plan"):
                    self._planned_tokens[model] = self._plan(model, *shape, bfloat16=bfloat16)
        self._threads.in_bfloat16 = bfloat16
        return autocast_if(bfloat16, parameter.device.type)

    def after_call(self, model: torch.nn.Module, outputs: Any) -> Any:
        """The outputs, cast to float32 if the call computed in bfloat16. Also reports the job to moreh-smi."""
        self.job.report()
        return in_float32(outputs) if self._threads.in_bfloat16 else outputs

    def instead_of_call(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs of a batch with labels; NotImplemented for calls that the model's own forward must compute."""
        outputs = self._fast_outputs(model, args, kwargs)
        if outputs is NotImplemented and self.options.uses("keep_freed_memory"):
            parameter = first_parameter(model)
            if parameter is not None and parameter.is_cpu:
                before_own_forward(with_grad=torch.is_grad_enabled())
        return outputs

    def _fast_outputs(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("labels") is None or self._is_small(model, args, kwargs):
            return NotImplemented
        if self._fast_path is None:
            # Importing transformers takes seconds; a script that passes labels has most likely imported it already.
            from moreh.runtime.engine.fast_path import FastPath

            self._fast_path = FastPath(self.options)
        # The fast path replaces modules during a call, so no other thread may compute with them.
        with CALL_THREADS.alone() as is_alone:
            if not is_alone:
                return NotImplemented
            return self._fast_path.call(model, args, kwargs, self._micro_batch_tokens.get(model, UNPLANNED_TOKENS))

    def _is_small(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True if a batch is too small to gain from micro-batches without padding."""
        shape = _tokens_shape(args, kwargs)
        return shape is not None and self._flops(model, shape[0] * shape[1]) < MIN_FLOPS

    def _flops(self, model: torch.nn.Module, tokens: int) -> int:
        """FLOPs of a training step: a matmul takes 6 FLOPs per weight and token in forward and backward pass."""
        if model not in self._flops_per_token:
            self._flops_per_token[model] = 6 * sum(parameter.numel() for parameter in model.parameters())
        return tokens * self._flops_per_token[model]

    def _prepare(self, model: torch.nn.Module) -> None:
        if self.job.simulated and not any(parameter.is_meta for parameter in model.parameters()):
            self.job.ledger.add_module(model)
        if self.options.activation_recomputation is True:
            recompute_activations(model, "full")

    def _plan(self, model: torch.nn.Module, batch_size: int, sequence_length: int, *, bfloat16: bool) -> float:
        """Plan the training for the accelerator and for this machine.

        Returns the number of tokens of the largest batch that the plan is valid for.

        Raises:
            PlanError: no plan divides the batch under the options.
            torch.OutOfMemoryError: no plan fits the accelerator.
        """
        try:
            training = Training(describe_module(model), batch_size, sequence_length, optimizer_in_use(model))
        except PlanError as reason:
            logger.info("This model cannot be planned, so it is trained without a plan: %s", reason)
            return math.inf
        precision = {"bfloat16": bfloat16, "half_weights": has_half_weights(model)}
        flavor = self.job.accelerator.flavor
        if not flavor.simulated:
            flavor = flavor.with_devices(1, 1)  # one worker computes on one GPU
        try:
            constraints = constraints_from_options(self.options, self.variables, flavor.devices)
            selection = select_plan(
                training, flavor, constraints, self.options, self.variables, logger.info, **precision
            )
        except PlanError as reason:
            if model not in self._planned_tokens:
                raise
            # A larger batch must not stop a training run that has begun.
            logger.info("A batch of %d x %d cannot be planned: %s", batch_size, sequence_length, reason)
            return training.tokens
        self._report_accelerator_plan(model, training, flavor, selection)
        self._use_local_plan(model, training, flavor, precision)
        logger.info(self.options.optimizations_text())
        return training.tokens

    def _report_accelerator_plan(
        self, model: torch.nn.Module, training: Training, flavor: Flavor, selection: Selection
    ) -> None:
        """Report the accelerator's plan to moreh-smi and the run's report; without one, raise or warn."""
        if selection.prediction is not None:
            self.job.keep_plan(flavor_plan(flavor, selection.prediction, training))
            if self.job.simulated:
                self.job.use_prediction(model, predicted_use(selection.prediction, flavor.devices))
            return
        memory_fraction = self.variables.memory_percent / 100
        error = nothing_fits_error(selection.smallest_bytes, memory_fraction, self.job.accelerator, flavor)
        if flavor.simulated:
            raise error
        # The model may fit all the same, so a prediction is no reason to refuse the training.
        logger.warning("%s Trying the plan that needs the least memory.", error)

    def _use_local_plan(
        self, model: torch.nn.Module, training: Training, flavor: Flavor, precision: dict[str, bool]
    ) -> None:
        """Plan for this machine: sets the size of micro-batches and activation recomputation."""
        local = select_local_plan(training, flavor, self.options, self.variables, **precision)
        if local.plan.recomputation == "full" and self.options.activation_recomputation == "auto":
            recompute_activations(model, "full")  # permanent: a smaller batch later is not worth another change
        self._micro_batch_tokens[model] = local.plan.micro_batch_size * training.sequence_length
        micro_batches = f"micro-batches of at most {self._micro_batch_tokens[model]:,} tokens"
        text = f"{micro_batches}, recomputation : {local.plan.recomputation}"
        self.job.keep_plan(local_plan(1, text, local, training, local_device(flavor)))
        logger.info(
            "This machine: 1 worker, %s; predicted: %s a step and %s, for rows without padding.",
            text,
            seconds_text(local.step_time_s),
            memory_text(local, flavor),
        )
        if self._flops(model, training.tokens) < MIN_FLOPS:
            logger.info("Batches of this size are too small to benefit: the model's own forward pass computes them.")

    def _uses_bfloat16(self, device: torch.device) -> bool:
        if device not in self._bfloat16_by_device:
            self._bfloat16_by_device[device] = choose_bfloat16(device, requested=self.options.mixed_precision)
        return self._bfloat16_by_device[device]


def install_hook(options: ParallelOptions, variables: PlannerVariables) -> None:
    """Apply the options to every model from now on, and let this process use all devices of the accelerator.

    Installs a `SingleWorkerHook`, or a `MultiWorkerHook` on several workers.

    Raises:
        AcceleratorError: another process is using the accelerator.
    """
    job = local_job()
    job.uses_all_devices = True
    if options.uses("fused_optimizer"):
        on_optimizer_created(use_fused_kernels)
    world = current_world()
    if world.size > 1:
        # Importing torch.distributed and transformers takes seconds, and one worker does not need them yet.
        from moreh.runtime.engine.multi_worker_hook import install_multi_worker_hook

        install_multi_worker_hook(options, variables, job, world)
        return
    hook = SingleWorkerHook(options, variables, job)
    around_model_calls(hook.around_call, hook.after_call)
    instead_of_model_calls(hook.instead_of_call)


def _trains(model: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """True if a call trains a model: gradients are enabled, a parameter requires them, and there are labels.

    A custom loss passes no labels, so the training mode decides. With labels the mode does not matter: a model can be
    trained in evaluation mode, without dropout.
    """
    if not torch.is_grad_enabled() or not (model.training or kwargs.get("labels") is not None):
        return False
    first = first_parameter(model)
    return (first is not None and first.requires_grad) or any(p.requires_grad for p in model.parameters())


def _tokens_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Batch size and sequence length of the token ids or embeddings that a model is called with; None without them."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point():
        return ids.shape[0], ids.shape[1]
    embeddings = kwargs.get("inputs_embeds")
    if isinstance(embeddings, torch.Tensor) and embeddings.dim() == 3:
        return embeddings.shape[0], embeddings.shape[1]
    return None
