"""What the hook adds to a forward pass: mixed precision, activation recomputation, and the log of what was chosen.

It is attached to no model: it holds for models made before and after, for copies, and for parts of models that are called
by themselves.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moreh.accelerator.local_job import LocalJob, local_job
from moreh.accelerator.model_calls import run_around_model_calls
from moreh.errors import OptionError
from moreh.log import logger
from moreh.option import ParallelOptions
from moreh.runtime.precision import LEAST_SPEEDUP, bfloat16_speedup


class _Runtime:
    """The options that are in force and the models that they have been applied to."""

    def __init__(self, options: ParallelOptions, job: LocalJob) -> None:
        self.options = options
        self.job = job
        self._prepared: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._logged: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._low_precision: dict[torch.device, bool] = {}

    @contextmanager
    def around_call(self, model: torch.nn.Module) -> Iterator[None]:
        """Prepare a model before its first forward pass; compute each of them in the precision that was chosen."""
        if model not in self._prepared:
            self._prepare(model)
            self._prepared.add(model)
        parameter = next(model.parameters())
        # A model of another type, or one that the script runs under an autocast of its own, is left as it is.
        if parameter.dtype == torch.float32 and not _inside_autocast() and self._uses_bfloat16(parameter.device):
            with torch.autocast(parameter.device.type, dtype=torch.bfloat16):
                yield
        else:
            yield

    def after_call(self, model: torch.nn.Module, outputs: Any) -> None:
        """Log the choice after a model's first forward pass with gradients, and report to moreh-smi."""
        logits = getattr(outputs, "logits", None)
        if isinstance(logits, torch.Tensor) and logits.dim() > 0 and logits.requires_grad and model not in self._logged:
            self._logged.add(model)
            self._log_choice(batch_size=logits.shape[0])
        self.job.report()

    def _prepare(self, model: torch.nn.Module) -> None:
        if self.job.simulated and not any(parameter.is_meta for parameter in model.parameters()):
            self.job.ledger.add_module(model)
        if self.options.activation_recomputation is True:
            _recompute_activations(model)

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

    def _log_choice(self, batch_size: int) -> None:
        recomputation = "full(2)" if self.options.activation_recomputation is True else "none(0)"
        logger.info("Configuration for parallelism is selected.")
        logger.info(
            "num_stages : 1, num_micro_batches : 1, batch_per_device : %d, No TP, recomputation : %s, "
            "distribute_param : false, distribute_low_prec_param : false",
            batch_size,
            recomputation,
        )
        logger.info("train: true")


def run_models_with(options: ParallelOptions) -> None:
    """Apply the options to every model from now on, and let this process use all devices of the accelerator.

    Raises:
        AcceleratorError: another process is using the accelerator.
    """
    job = local_job()
    job.uses_all_devices = True
    runtime = _Runtime(options, job)
    run_around_model_calls(runtime.around_call, runtime.after_call)


def _recompute_activations(model: torch.nn.Module) -> None:
    """Switch recomputation on in a model of transformers, or in those that a module of the user's contains.

    A module without layers of its own kind to recompute, such as an embedding or a head that is called by itself, has
    nothing to gain and is left alone.

    Raises:
        OptionError: a model of transformers does not support it, or a module with several layers is none of theirs.
    """
    from transformers import PreTrainedModel

    candidates = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    outermost = [m for m in candidates if not any(m is not other and m in other.modules() for other in candidates)]
    if not outermost and len(list(model.children())) > 0:
        raise OptionError(
            f"activation_recomputation=True: {type(model).__name__} is no model of transformers, whose layers could be "
            'recomputed; use False or "auto"'
        )
    for pretrained in outermost:
        if not pretrained.supports_gradient_checkpointing:
            raise OptionError(
                f'activation_recomputation=True: {type(pretrained).__name__} does not support it; use False or "auto"'
            )
        # Older releases of transformers 5 call it gradient_checkpointing_enable.
        enable: Any = getattr(pretrained, "activation_checkpointing_enable", None) or pretrained.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def _inside_autocast() -> bool:
    """Whether the script has opened an autocast context, be it one that switches autocast off."""
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return nesting > 0
