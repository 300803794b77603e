"""The public interface `torch.moreh.option`: a thin layer over options.py and the runtime."""

import inspect
import multiprocessing
import os
import textwrap
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ParamSpec

from moreh.accelerator.gpus import shares_gpus
from moreh.errors import OptionError
from moreh.options import (
    MAX_WORKERS,
    ParallelOptions,
    is_switched_off,
    launch_variables,
    parse_options,
    planner_variables,
)
from moreh.patches.world_variables import variables
from moreh.system import refused_processes
from moreh.trace import read_variable

Options = ParamSpec("Options")

# `import torch` imports this file, so this is the working directory before most scripts change it.
try:
    _START_DIRECTORY = os.getcwd()  # noqa: PTH109
except OSError:
    _START_DIRECTORY = ""  # the working directory was deleted

_enabled: ParallelOptions | None = None


def _with_options_of(declaration: Callable[Options, Any]) -> Callable[[Callable[..., None]], Callable[Options, None]]:
    """Give a function the signature and the documentation of the declared options, for editors and `help()`."""

    def decorate(function: Callable[..., None]) -> Callable[Options, None]:
        signature = inspect.signature(declaration).replace(return_annotation=None)
        function.__signature__ = signature  # type: ignore[attr-defined]
        if function.__doc__ is not None:  # it is None under python -OO
            function.__doc__ = function.__doc__.replace("    Raises:\n", _documentation() + "\n\n    Raises:\n", 1)
        return function

    return decorate


def _documentation() -> str:
    """The "Args:" section of a docstring."""
    lines = ["    Args:"]
    for option in fields(ParallelOptions):
        text = f"{option.name}: {option.metadata['doc']} Allowed: {option.metadata['allowed']}."
        lines += textwrap.wrap(text, 96, initial_indent=" " * 8, subsequent_indent=" " * 12, break_long_words=False)
    return "\n".join(lines)


@_with_options_of(ParallelOptions)
def enable_advanced_parallelization(*args: Any, **options: Any) -> None:
    """Plan and run the models of this process on all devices of the accelerator.

    Call it once, before the script creates its model. The options, keywords only, restrict the plan. With
    MOREH_ENABLE_ADVANCED_PARALLELIZATION=0 in the environment, the call does nothing.

    With several workers (MOREH_WORKERS; by default the number of GPUs, else one), the call starts the script again in
    each worker, waits for the workers, and exits with their exit code: no later line of the script runs in this
    process. In a process that this function or torchrun has started as a worker, the call joins the other workers.

    Raises:
        OptionError: an option is unknown, the value of an option or an environment variable is invalid, or several
            workers are requested in a session without a script to start again.
        AcceleratorError: another process is using the accelerator.
    """
    global _enabled
    if args:
        raise OptionError(
            f"enable_advanced_parallelization({', '.join(map(repr, args))}): options are given by name, such as "
            f"num_stages=4. The options are: {', '.join(option.name for option in fields(ParallelOptions))}"
        )
    parsed = parse_options(options)
    if is_switched_off():
        return
    variables = planner_variables()
    read_variable()
    launching = launch_variables()
    workers = _workers_to_start()
    if _enabled == parsed:
        return
    if _enabled is not None:
        raise OptionError(f"advanced parallelization is already enabled, with {_enabled}: call it once for a process")
    # These imports need torch, which is not imported yet when this file runs.
    if workers > 1 or (workers == 1 and launching.max_restarts > 0):
        from moreh.runtime.launch.launcher import launch

        launch(workers, _START_DIRECTORY, launching)  # does not return
    from moreh.runtime.engine.hook import install_hook
    from moreh.runtime.launch.world import join_world

    join_world()
    install_hook(parsed, variables)
    _enabled = parsed


def _workers_to_start() -> int:
    """Number of workers that this process has to start: 1 if it computes alone, 0 if it is a worker itself.

    Raises:
        OptionError: MOREH_WORKERS is not a whole number from 1 to MAX_WORKERS, or exceeds the number of GPUs or the
            limits of this machine's cores and memory.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    value = os.environ.get("MOREH_WORKERS", str(max(gpus, 1))).strip()
    if not (value.isascii() and value.isdecimal() and 1 <= int(value) <= MAX_WORKERS):
        raise OptionError(
            f"MOREH_WORKERS={value!r}: expected a whole number from 1 to {MAX_WORKERS}; the number of GPUs, else 1, "
            "if unset"
        )
    # torchrun or this package started this process as a worker, or multiprocessing started it to help a worker.
    if {"RANK", "WORLD_SIZE"} & variables().keys() or multiprocessing.parent_process() is not None:
        return 0
    if int(value) > gpus > 0 and not shares_gpus():
        raise OptionError(
            f"MOREH_WORKERS={value}: this machine has {gpus} GPU(s), which allow one worker each; set "
            "CUDA_VISIBLE_DEVICES to nothing to compute on the CPU, or MOREH_SHARE_GPUS=1 to test with several workers "
            "on one GPU"
        )
    refusal = None if gpus else refused_processes(int(value))
    if refusal is not None:
        raise OptionError(f"MOREH_WORKERS={value} (accelerator.workers): {refusal}")
    return int(value)


def __getattr__(name: str) -> Any:
    """Raise an AttributeError that names the replacement of an older entry point of the platform."""
    if name in ("parallelizer_init",):
        raise AttributeError(
            f"torch.moreh.option.{name} is an older entry point of the MoAI Platform, which this package does not "
            "provide: call torch.moreh.option.enable_advanced_parallelization() once, before the script creates its "
            "model, and train as on one device"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
