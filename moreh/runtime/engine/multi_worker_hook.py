"""The hook around calls of models on several workers: plans and shards a model at its first training batch."""

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
from moreh.models.introspection import is_causal_language_model, unwrapped
from moreh.options import ParallelOptions, PlannerVariables
from moreh.patches.module_call import instead_of_model_calls
from moreh.patches.several_workers.numpy_arrays import note_arrays
from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.report.chosen_plan import flavor_plan, local_device, local_plan, memory_text
from moreh.planner.search.constraints import constraints_from_options
from moreh.planner.units import seconds_text
from moreh.runtime.batch.model_inputs import ModelInputs, read_inputs
from moreh.runtime.engine.calls.checks import check_functional_call, check_modules, check_surroundings, check_thread
from moreh.runtime.engine.checkpoint_api import is_waiting_for_state, load_pending
from moreh.runtime.engine.choose_plan import (
    predicted_use,
    select_plan,
    select_worker_plan,
    within_runtime_limits,
)
from moreh.runtime.engine.evaluation import evaluate_unsharded
from moreh.runtime.engine.optimizer_in_use import optimizer_in_use
from moreh.runtime.engine.sharded.call import call_sharded
from moreh.runtime.engine.sharded.install import support_optimizers_and_clipping
from moreh.runtime.engine.sharded.registry import check_not_sharded, is_submodule_of_sharded, runner_of, whole_model
from moreh.runtime.engine.sharded.shard_model import shard_model
from moreh.runtime.kernels.precision import autocast_if, choose_bfloat16, in_float32, inside_autocast
from moreh.runtime.launch.script_files import share_script_files
from moreh.runtime.launch.world import World
from moreh.runtime.sharding.local_weights import (
    convert_parameters,
    has_half_weights,
    patch_lazy_loading,
)
from moreh.trace import span

Decision = TypeVar("Decision")


class MultiWorkerHook:
    """The options that are in force in a world of several workers. It alone decides about every call of a model."""

    def __init__(self, options: ParallelOptions, variables: PlannerVariables, job: LocalJob, world: World) -> None:
        self.options = options
        self.variables = variables
        self.job = job
        self.world = world
        # Whether bfloat16 is used; None until its speed has been measured.
        self._bfloat16: bool | None = None
        self._logged_as_unsharded: set[type] = set()

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs for the script's call; NotImplemented if the module's own forward pass is to compute them.

        Until its first training batch a model is whole on every worker. From then on the model is sharded and called
        through `call_sharded`, in the precision that is chosen here.

        Raises:
            OptionError: the call asks for what a model on several workers cannot give.
        """
        module = whole_model(module)
        if is_submodule_of_sharded(module):
            return call_sharded(module, args, kwargs)  # refuses it
        if runner_of(module) is None and not is_causal_language_model(module):
            self._log_unsharded(module)
            return NotImplemented
        check_surroundings()
        check_modules(module)
        bfloat16 = not inside_autocast() and self._dtype_of(module) == torch.float32 and self._uses_bfloat16()
        with autocast_if(bfloat16, self._device.type):
            if runner_of(module) is None:
                check_not_sharded(module)
                inputs = read_inputs(unwrapped(module), args, kwargs)
                if not self._must_be_sharded(module, inputs):
                    convert_parameters(module)
                    if inputs.labels is None or unsupported_reason(module) is not None:
                        return NotImplemented
                    check_thread()
                    return evaluate_unsharded(module, inputs, self.world)
                check_thread()
                self._shard(module, inputs, bfloat16=bfloat16)
            check_thread()
            outputs = call_sharded(module, args, kwargs)
        return in_float32(outputs) if bfloat16 else outputs

    def _must_be_sharded(self, module: nn.Module, inputs: ModelInputs) -> bool:
        """True if a whole model has to be sharded for this call: for training, or to get its weights onto the device.

        A call trains if gradients are on and a parameter or an input wants them: with labels in either mode, without
        labels in training mode.

        Raises:
            OptionError: the call is not a training step, but needs weights that are read when the model is sharded.
        """
        wants_gradients = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*module.parameters(), *inputs.tensors.values())
        )
        if wants_gradients and (module.training or inputs.labels is not None):
            return True
        if next(module.parameters()).device == self._device and not is_waiting_for_state(module):
            return False
        if inputs.labels is None:
            raise OptionError(
                "the model was called without labels before it was sharded over the workers: call it with labels first"
            )
        return True

    def _shard(self, module: nn.Module, inputs: ModelInputs, *, bfloat16: bool) -> None:
        _check_has_data(module)
        check_functional_call()
        with span("choose_plan"):
            plan = self._decide_on_first_worker(lambda: self._plan(module, inputs, bfloat16=bfloat16))
        shard_model(module, plan, self.options)
        load_pending(module)

    def _plan(self, module: nn.Module, inputs: ModelInputs, *, bfloat16: bool) -> Plan:
        """The plan that the workers run. Also plans for the accelerator, and logs both plans.

        Raises:
            PlanError: no plan divides the batch or the model.
            torch.OutOfMemoryError: no plan fits the accelerator.
        """
        training = Training(
            describe_module(module),
            inputs.batch_size,
            inputs.sequence_length,
            optimizer_in_use(module),
            own_loss=inputs.labels is None,
        )
        accelerator = self.job.accelerator
        flavor, workers = accelerator.flavor, self.world.size
        if not flavor.simulated:
            flavor = flavor.with_devices(workers, self.world.local_size)  # each worker has a GPU
        constraints = constraints_from_options(self.options, self.variables, flavor.devices)
        if flavor.devices == workers:
            constraints = within_runtime_limits(constraints, module)
        selection = select_plan(
            training,
            flavor,
            constraints,
            self.options,
            self.variables,
            logger.info,
            bfloat16=bfloat16,
            half_weights=has_half_weights(module),
        )
        if selection.prediction is None:
            raise nothing_fits_error(selection.smallest_bytes, self.variables.memory_percent / 100, accelerator, flavor)
        self.job.keep_plan(flavor_plan(flavor, selection.prediction, training))
        self.job.use_prediction(module, predicted_use(selection.prediction, flavor.devices))
        if selection.prediction.plan.devices == workers:
            logger.info("The %d workers run this plan, one per device.", workers)
            logger.info(self.options.optimizations_text())
            return selection.prediction.plan
        local = select_worker_plan(module, training, flavor, self.options, self.variables, workers, bfloat16=bfloat16)
        self.job.keep_plan(local_plan(workers, plan_text(local.plan), local, training, local_device(flavor)))
        logger.info(
            "This machine: %d workers run the plan '%s'; predicted: %s a step and %s on the fullest worker, "
            "for rows without padding.",
            workers,
            plan_text(local.plan),
            seconds_text(local.step_time_s),
            memory_text(local, flavor),
        )
        logger.info(self.options.optimizations_text())
        return local.plan

    def _decide_on_first_worker(self, decide: Callable[[], Decision]) -> Decision:
        """Worker 0's decision, on all workers; collective. An error of worker 0 is raised on all workers."""
        check_thread()
        decision_or_error: list[Any] = [None, None]
        if self.world.rank == 0:
            try:
                decision_or_error[0] = decide()
            except MorehError as error:
                decision_or_error[1] = error
        dist.broadcast_object_list(decision_or_error, 0)
        decision, raised = decision_or_error
        if raised is not None:
            raise raised
        return decision

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def _uses_bfloat16(self) -> bool:
        if self._bfloat16 is None:
            self._bfloat16 = self._decide_on_first_worker(
                lambda: choose_bfloat16(self._device, requested=self.options.mixed_precision)
            )
        return self._bfloat16

    def _dtype_of(self, module: nn.Module) -> torch.dtype:
        """The dtype of the parameters."""
        runner = runner_of(module)
        return next(module.parameters()).dtype if runner is None else runner.model.dtype

    def _log_unsharded(self, module: nn.Module) -> None:
        if type(module) not in self._logged_as_unsharded:
            self._logged_as_unsharded.add(type(module))
            logger.info(
                "%s is not a causal language model of transformers: each worker computes the whole model on all data.",
                type(module).__name__,
            )


def _check_has_data(module: nn.Module) -> None:
    """Raise an OptionError if a parameter of a model is on the meta device."""
    without = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if without:
        raise OptionError(
            f"{len(without)} parameters have no data, such as {without[0]}, which is on the meta device: load the "
            "model with from_pretrained, or call model.to_empty(device='cuda') and load or initialize its weights, "
            "before it is called with labels"
        )


def install_multi_worker_hook(
    options: ParallelOptions, variables: PlannerVariables, job: LocalJob, world: World
) -> None:
    """Apply the options to every model from now on, in a world of several workers; collective."""
    workers: list[Any] = [None] * world.size
    dist.all_gather_object(workers, (world.rank, socket.gethostname(), os.getpid()))
    job.worker_pids = tuple((rank, pid) for rank, host, pid in workers if host == socket.gethostname())
    share_script_files(world)
    note_arrays()
    patch_lazy_loading()
    support_optimizers_and_clipping()
    instead_of_model_calls(MultiWorkerHook(options, variables, job, world).call)
