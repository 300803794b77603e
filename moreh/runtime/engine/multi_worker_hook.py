"""What the hook does in each of several workers: at the first training batch a model is planned and divided over them."""

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from moreh.accelerator.job import LocalJob
from moreh.accelerator.memory.out_of_memory import nothing_fits_error
from moreh.errors import MorehError, OptionError
from moreh.log import logger
from moreh.models.compatibility import unsupported_reason
from moreh.models.describe.from_module import describe_module
from moreh.models.introspection import unwrapped
from moreh.options import ParallelOptions, PlannerVariables
from moreh.patches.module_call import instead_of_model_calls
from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.search.constraints import constraints_from_options
from moreh.planner.units import gib, seconds_text
from moreh.runtime.batch.model_inputs import ModelInputs, read_inputs
from moreh.runtime.engine.checkpoint_api import is_waiting_for_state, load_pending
from moreh.runtime.engine.choose_plan import predicted_use, select_plan, select_worker_plan, within_runtime_limits
from moreh.runtime.engine.evaluation import evaluate_unsharded
from moreh.runtime.engine.optimizer_patches import on_optimizer_created
from moreh.runtime.engine.registry import (
    call_sharded,
    install_sharding_support,
    is_submodule_of_sharded,
    runner_of,
    shard_model,
)
from moreh.runtime.kernels.fused_adam import use_fused_kernels
from moreh.runtime.kernels.precision import autocast_if, choose_bfloat16, in_float32, inside_autocast
from moreh.runtime.launch.world import World
from moreh.runtime.sharding.local_weights import patch_lazy_loading, target_dtypes

Result = TypeVar("Result")


class MultiWorkerHook:
    """The options that are in force in a world of several workers."""

    def __init__(self, options: ParallelOptions, variables: PlannerVariables, job: LocalJob, world: World) -> None:
        self.options = options
        self.variables = variables
        self.job = job
        self.world = world
        self._bfloat16: bool | None = None
        self._left_whole: set[type] = set()

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of the script's gives: of a divided model, or of one that is divided now because it is trained.

        Before its first training batch a model is whole on every worker; batches with labels are shared between them.
        """
        if runner_of(module) is None and (is_submodule_of_sharded(module) or not _is_language_model(module)):
            self._say_left_whole(module)
            return NotImplemented
        parameter = next(module.parameters())
        bfloat16 = not inside_autocast() and self._target_dtype(module) == torch.float32 and self._uses_bfloat16()
        with autocast_if(bfloat16, self._device.type):
            if runner_of(module) is None:
                inputs = read_inputs(unwrapped(module), args, kwargs)
                training = torch.is_grad_enabled() and module.training and inputs.labels is not None
                if not training and is_waiting_for_state(module):
                    raise OptionError(
                        "the model was called before its first training step after resuming: its weights are read when it is "
                        "divided over the workers; train first"
                    )
                if not training and parameter.device == self._device:
                    if inputs.labels is None or unsupported_reason(module) is not None:
                        return NotImplemented
                    return evaluate_unsharded(module, inputs, self.world)
                if inputs.labels is None:
                    raise OptionError(
                        "the model was called without labels before it was divided over the workers: call it with labels first"
                    )
                self._divide(module, inputs, bfloat16=bfloat16)
            outputs = call_sharded(module, args, kwargs)
        return in_float32(outputs) if bfloat16 else outputs

    def _divide(self, module: nn.Module, inputs: ModelInputs, *, bfloat16: bool) -> None:
        plan = self._on_first_worker(lambda: self._plan(module, inputs, bfloat16=bfloat16))
        shard_model(module, plan, self.options)
        load_pending(module)

    def _plan(self, module: nn.Module, inputs: ModelInputs, *, bfloat16: bool) -> Plan:
        """The plan that the workers carry out, with the log lines of that for the accelerator.

        Raises:
            PlanError: no plan divides the batch or the model.
            SimulatedOutOfMemoryError: no plan fits the accelerator.
        """
        training = Training(describe_module(module), inputs.rows, inputs.sequence_length)
        accelerator = self.job.accelerator
        flavor, workers = accelerator.flavor, self.world.size
        restrictions = constraints_from_options(self.options, self.variables, flavor.devices)
        if flavor.devices == workers:
            restrictions = within_runtime_limits(restrictions, module)
        selection = select_plan(training, flavor, restrictions, self.options, self.variables, logger.info)
        if selection.prediction is None:
            raise nothing_fits_error(selection.smallest_bytes, self.variables.memory_percent / 100, accelerator)
        self.job.use_prediction(module, predicted_use(selection.prediction, flavor.devices))
        if selection.prediction.plan.devices == workers:
            logger.info("The %d workers are the accelerator's devices: they carry out this plan.", workers)
            logger.info(self.options.optimizations_text())
            return selection.prediction.plan
        local = select_worker_plan(module, training, self.options, self.variables, workers, bfloat16=bfloat16)
        logger.info(
            "This machine: %d workers carry out the plan '%s'; predicted are %s a step and %s on the fullest worker for rows "
            "without padding.",
            workers,
            plan_text(local.plan),
            seconds_text(local.step_time_s),
            gib(local.memory_bytes),
        )
        logger.info(self.options.optimizations_text())
        return local.plan

    def _on_first_worker(self, decide: Callable[[], Result]) -> Result:
        """What worker 0 decides, on all workers; an error of its is raised on all of them."""
        decided: list[Any] = [None, None]
        if self.world.rank == 0:
            try:
                decided[0] = decide()
            except MorehError as error:
                decided[1] = error
        dist.broadcast_object_list(decided, 0)
        if decided[1] is not None:
            raise decided[1]
        result: Result = decided[0]
        return result

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def _uses_bfloat16(self) -> bool:
        if self._bfloat16 is None:
            self._bfloat16 = self._on_first_worker(
                lambda: choose_bfloat16(self._device, requested=self.options.mixed_precision)
            )
        return self._bfloat16

    def _target_dtype(self, module: nn.Module) -> torch.dtype:
        model_runner = runner_of(module)
        if model_runner is not None:
            return next(iter(model_runner.model.compute_params.values())).dtype
        return next(iter(target_dtypes(module).values()))

    def _say_left_whole(self, module: nn.Module) -> None:
        if type(module) not in self._left_whole and not is_submodule_of_sharded(module):
            self._left_whole.add(type(module))
            logger.info(
                "%s is no causal language model of transformers: each worker computes it whole, on the same data.",
                type(module).__name__,
            )


def install_multi_worker_hook(
    options: ParallelOptions, variables: PlannerVariables, job: LocalJob, world: World
) -> None:
    """Apply the options to every model from now on, in a world of several workers."""
    workers: list[Any] = [None] * world.size
    dist.all_gather_object(workers, (world.rank, socket.gethostname(), os.getpid()))
    job.worker_pids = tuple((rank, pid) for rank, host, pid in workers if host == socket.gethostname())
    patch_lazy_loading()
    # Asked before what computes divided models, which chooses no precision.
    instead_of_model_calls(MultiWorkerHook(options, variables, job, world).call)
    install_sharding_support()
    if options.uses("fused_optimizer"):
        on_optimizer_created(use_fused_kernels)


def _is_language_model(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    causal: Any = unwrapped(module)
    return isinstance(causal, PreTrainedModel) and causal.get_output_embeddings() is not None
