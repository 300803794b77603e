"""What the hook adds to a forward pass: mixed precision, activation recomputation, and the log of what was chosen.

It is attached to no model: torch calls it for every module, and the outermost one that has parameters is the model. So it
holds for models made before and after, for copies and for parts of models that are called by themselves.
"""

import threading
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from moreh.accelerator.local_job import LocalJob, local_job
from moreh.errors import OptionError
from moreh.log import logger
from moreh.option import ParallelOptions
from moreh.runtime.precision import LEAST_SPEEDUP, bfloat16_speedup


class _Forward(threading.local):
    """The forward pass that a thread is in: its model, how often that model has entered itself, and open contexts."""

    model: torch.nn.Module | None = None
    depth = 0
    contexts = ExitStack()


class _Runtime:
    """The options that are in force and the models that they have been applied to."""

    def __init__(self, options: ParallelOptions, job: LocalJob) -> None:
        self.options = options
        self.job = job
        self._forward = _Forward()
        self._prepared: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._logged: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._low_precision: dict[torch.device, bool] = {}

    def before_forward(self, module: torch.nn.Module, inputs: Any) -> None:
        forward = self._forward
        if forward.model is not None:
            forward.depth += module is forward.model
            return
        if torch.compiler.is_compiling() or _in_backward_pass():
            return
        parameter = next(module.parameters(), None)
        if parameter is None:
            return
        if module not in self._prepared:
            self._prepare(module)
        forward.model, forward.depth, forward.contexts = module, 1, ExitStack()
        if self._uses_bfloat16(parameter.device):
            forward.contexts.enter_context(torch.autocast(parameter.device.type, dtype=torch.bfloat16))

    def after_forward(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        forward = self._forward
        if module is not forward.model:
            return
        forward.depth -= 1
        if forward.depth == 0:
            forward.model = None
            forward.contexts.close()
            logits = getattr(outputs, "logits", None)
            if logits is not None and logits.requires_grad and module not in self._logged:
                self._log_choice(module, batch_size=logits.shape[0])
            self.job.report()

    def _prepare(self, model: torch.nn.Module) -> None:
        self._prepared.add(model)
        self.job.watch_module(model)
        if self.options.activation_recomputation is True:
            if not getattr(model, "supports_gradient_checkpointing", False):
                raise OptionError(
                    f'activation_recomputation=True: {type(model).__name__} does not support recomputation; use False or "auto"'
                )
            # Older releases of transformers 5 call it gradient_checkpointing_enable.
            enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def _uses_bfloat16(self, device: torch.device) -> bool:
        if device not in self._low_precision:
            if not self.options.mixed_precision or device.type == "meta":
                self._low_precision[device] = False
            else:
                speedup = bfloat16_speedup(device)
                self._low_precision[device] = speedup >= LEAST_SPEEDUP
                logger.info(
                    "mixed_precision : %s (bfloat16 matrix products are %.1f x as fast as float32 here)",
                    "bfloat16" if self._low_precision[device] else "off, float32",
                    speedup,
                )
        return self._low_precision[device]

    def _log_choice(self, model: torch.nn.Module, batch_size: int) -> None:
        self._logged.add(model)
        recomputation = "full(2)" if self.options.activation_recomputation is True else "none(0)"
        logger.info("Configuration for parallelism is selected.")
        logger.info(
            "num_stages : 1, num_micro_batches : 1, batch_per_device : %d, No TP, recomputation : %s, "
            "distribute_param : false, distribute_low_prec_param : false",
            batch_size,
            recomputation,
        )
        logger.info("train: true")


def _in_backward_pass() -> bool:
    """Whether this thread is inside autograd's engine, where recomputation calls parts of a model by themselves."""
    return torch._C._current_graph_task_id() != -1


def run_models_with(options: ParallelOptions) -> None:
    """Apply the options to every model from now on, and let this process use all devices of the accelerator.

    Raises:
        AcceleratorError: another process is using the accelerator.
    """
    global _runtime
    if _runtime is not None:
        return
    job = local_job()
    job.uses_all_devices = True
    _runtime = _Runtime(options, job)
    register_module_forward_pre_hook(_runtime.before_forward)
    register_module_forward_hook(_runtime.after_forward, always_call=True)


_runtime: _Runtime | None = None
