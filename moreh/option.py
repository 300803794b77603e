"""The public switches: `torch.moreh.option`."""

import difflib
import os
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from moreh.errors import OptionError

Auto = Literal["auto"]
_SWITCH = "True or False"
_SWITCH_OR_AUTO = 'True, False or "auto"'
_COUNT = 'a whole number from 1, or "auto"'


@dataclass(frozen=True)
class ParallelOptions:
    """The options of the hook, checked."""

    pipeline_parallel: bool
    num_stages: int | Auto
    num_micro_batches: int | Auto
    activation_recomputation: bool | Auto
    distribute_parameter: bool | Auto
    mixed_precision: bool


_ALLOWED = {
    "pipeline_parallel": _SWITCH,
    "num_stages": _COUNT,
    "num_micro_batches": _COUNT,
    "activation_recomputation": _SWITCH_OR_AUTO,
    "distribute_parameter": _SWITCH_OR_AUTO,
    "mixed_precision": _SWITCH,
}
_PLANNER_VARIABLES = tuple(
    f"MOREH_ADVANCED_PARALLELIZATION_{name}"
    for name in ("DETAILED_LOG", "MEMORY_USAGE_CORRECTION_RATIO", "MAX_PARALLEL_COMPILE_THREADS")
)

_enabled: ParallelOptions | None = None


def enable_advanced_parallelization(
    *,
    pipeline_parallel: bool = True,
    num_stages: int | Auto = "auto",
    num_micro_batches: int | Auto = "auto",
    activation_recomputation: bool | Auto = "auto",
    distribute_parameter: bool | Auto = "auto",
    mixed_precision: bool = True,
    **unknown: Any,
) -> None:
    """Plan and run the models of this process on all devices of the accelerator. Call it once, before a model is made.

    This version runs on one worker. What needs more of them, or a batch in pieces, is refused here.

    Args:
        pipeline_parallel: whether stages of a model may be put on different devices.
        num_stages: the number of pipeline stages.
        num_micro_batches: the number of micro-batches that a batch is cut into.
        activation_recomputation: recompute activations in the backward pass instead of keeping them ("auto": keep them).
        distribute_parameter: shard parameters, gradients and optimizer state over data-parallel ranks.
        mixed_precision: compute in bfloat16 with float32 weights, where the machine multiplies bfloat16 matrices faster.
        unknown: catches options that do not exist, to name the one that was meant.

    Raises:
        OptionError: an option is unknown, or its value is not allowed or cannot be carried out here.
        AcceleratorError: another process is using the accelerator.
    """
    global _enabled
    _refuse_unknown(unknown)
    options = ParallelOptions(
        pipeline_parallel,
        num_stages,
        num_micro_batches,
        activation_recomputation,
        distribute_parameter,
        mixed_precision,
    )
    _check_values(options)
    _check_one_worker(options)
    if _enabled == options:
        return
    if _enabled is not None:
        raise OptionError(f"advanced parallelization is already enabled, with {_enabled}: call it once for a process")
    from moreh.runtime.forward import (
        run_models_with,
    )  # needs torch, which is still being imported when this file is read

    run_models_with(options)
    _enabled = options


def _refuse_unknown(unknown: dict[str, Any]) -> None:
    names = [f.name for f in fields(ParallelOptions)]
    for name, value in unknown.items():
        close = difflib.get_close_matches(name, names, n=1)
        meant = f"; did you mean {close[0]}?" if close else "."
        raise OptionError(f"unknown option {name}={value!r}{meant} The options are: {', '.join(names)}")


def _check_values(options: ParallelOptions) -> None:
    for name, value in asdict(options).items():
        allowed = _ALLOWED[name]
        auto = isinstance(value, str) and value == "auto"
        if allowed == _COUNT:
            valid = auto or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)
        else:
            valid = isinstance(value, bool) or (allowed == _SWITCH_OR_AUTO and auto)
        if not valid:
            raise OptionError(f"{name}={value!r}: allowed is {allowed}")
    if not options.pipeline_parallel and options.num_stages not in ("auto", 1):
        raise OptionError(f"num_stages={options.num_stages!r} with pipeline_parallel=False: stages need pipeline_parallel=True")


def _check_one_worker(options: ParallelOptions) -> None:
    for variable in ("MOREH_WORKERS", "WORLD_SIZE"):
        value = os.environ.get(variable, "1")
        if value != "1":
            raise OptionError(f"{variable}={value}: this version runs on 1 worker; unset {variable} or set it to 1")
    for variable in _PLANNER_VARIABLES:
        if variable in os.environ:
            raise OptionError(
                f"{variable}={os.environ[variable]}: this version has no planner that would use it; unset {variable}"
            )
    if options.num_stages not in ("auto", 1):
        raise OptionError(
            f'num_stages={options.num_stages}: a stage needs a worker, and this version runs on 1; use 1 or "auto"'
        )
    if options.num_micro_batches not in ("auto", 1):
        raise OptionError(
            f"num_micro_batches={options.num_micro_batches}: this version computes a batch in one piece; "
            'use 1 or "auto", and a smaller batch with gradient accumulation in the script where memory is short'
        )
    if options.distribute_parameter is True:
        raise OptionError(
            'distribute_parameter=True: this version runs on 1 worker and has no others to shard over; use False or "auto"'
        )
