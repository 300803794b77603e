"""The public switch, `torch.moreh.option`: a thin layer over the options (moreh/options.py) and the runtime."""

import inspect
import multiprocessing
import os
from dataclasses import fields
from typing import Any

from moreh.errors import OptionError
from moreh.options import MAX_WORKERS, ParallelOptions, is_switched_off, parse_options, planner_variables

# This file is read while torch is imported, which comes before most of what changes the directory.
try:
    _START_DIRECTORY = os.getcwd()  # noqa: PTH109
except OSError:
    _START_DIRECTORY = ""  # it was deleted

_enabled: ParallelOptions | None = None


def enable_advanced_parallelization(**options: Any) -> None:
    """Plan and run the models of this process on all devices of the accelerator. Call it once, before a model is made.

    With several workers (MOREH_WORKERS; by default the number of GPUs, else one) the script is started again in each worker,
    and this process waits for them and ends as they did: nothing after this line runs in it. A process that was started as
    a worker, by this function or by torchrun, joins the others here.

    With MOREH_ENABLE_ADVANCED_PARALLELIZATION=0 in the environment it does nothing, for a comparison without it.

    The plan is made for the accelerator. The options, all by keyword, restrict it:

    {options}

    Raises:
        OptionError: an option is unknown, its value or that of an environment variable is not allowed, or several workers
            are wanted in a session that has no script to start again.
        AcceleratorError: another process is using the accelerator.
    """
    global _enabled
    asked = parse_options(options)
    if is_switched_off():
        return
    variables = planner_variables()
    workers = _workers_to_start()
    if _enabled == asked:
        return
    if _enabled is not None:
        raise OptionError(f"advanced parallelization is already enabled, with {_enabled}: call it once for a process")
    # These need torch, which is still being imported when this file is read.
    if workers > 1:
        from moreh.runtime.launch.launcher import launch

        launch(workers, start_directory=_START_DIRECTORY)  # does not return
    from moreh.runtime.engine.hook import install_hook
    from moreh.runtime.launch.world import join_world

    join_world()
    install_hook(asked, variables)
    _enabled = asked


def _describe_options() -> None:
    """Give the public function the signature and the documentation of the options, which are declared in one place."""
    declared = fields(ParallelOptions)
    enable_advanced_parallelization.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type
            )
            for option in declared
        ],
        return_annotation=None,
    )
    lines = [f"    {option.name}: {option.metadata['doc']}" for option in declared]
    text = enable_advanced_parallelization.__doc__ or ""  # None under python -OO
    enable_advanced_parallelization.__doc__ = text.replace("    {options}", "\n".join(lines))


_describe_options()


def _workers_to_start() -> int:
    """How many workers this process has to start: 1 if it is a worker itself, or computes alone.

    Raises:
        OptionError: MOREH_WORKERS is no whole number from 1, or more than there are GPUs, or more than MAX_WORKERS.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    text = os.environ.get("MOREH_WORKERS", str(max(gpus, 1))).strip()
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_WORKERS):
        raise OptionError(
            f"MOREH_WORKERS={text!r}: allowed is a whole number from 1 to {MAX_WORKERS}; the number of GPUs, else 1, if unset"
        )
    # Started by torchrun or by this package; or by multiprocessing, to help a process that is a worker already.
    if {"RANK", "WORLD_SIZE"} & os.environ.keys() or multiprocessing.parent_process() is not None:
        return 1
    if int(text) > gpus > 0:
        raise OptionError(
            f"MOREH_WORKERS={text}: this machine has {gpus} GPU(s), and allowed is one worker for each; set "
            "CUDA_VISIBLE_DEVICES to nothing to compute on the CPU"
        )
    return int(text)
