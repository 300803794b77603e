"""The public switches: `torch.moreh.option`."""

import difflib
import multiprocessing
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
    skip_padding: bool
    pack_rows: bool
    share_prefix: bool
    logits_at_labels: bool
    sparse_embedding: bool
    block_attention: bool
    fused_activation: bool
    fused_norm: bool
    fused_rotary: bool
    fused_optimizer: bool
    keep_freed_memory: bool


_ALLOWED = {
    "pipeline_parallel": _SWITCH,
    "num_stages": _COUNT,
    "num_micro_batches": _COUNT,
    "activation_recomputation": _SWITCH_OR_AUTO,
    "distribute_parameter": _SWITCH_OR_AUTO,
    "mixed_precision": _SWITCH,
    "skip_padding": _SWITCH,
    "pack_rows": _SWITCH,
    "share_prefix": _SWITCH,
    "logits_at_labels": _SWITCH,
    "sparse_embedding": _SWITCH,
    "block_attention": _SWITCH,
    "fused_activation": _SWITCH,
    "fused_norm": _SWITCH,
    "fused_rotary": _SWITCH,
    "fused_optimizer": _SWITCH,
    "keep_freed_memory": _SWITCH,
}
# This file is read while torch is imported, which comes before most of what changes the directory.
try:
    _START_DIRECTORY = os.getcwd()  # noqa: PTH109
except OSError:
    _START_DIRECTORY = ""  # it was deleted
# Of one machine. Each is a process that imports torch.
MAX_WORKERS = 256
_VARIABLE = "MOREH_ADVANCED_PARALLELIZATION_"


@dataclass(frozen=True)
class PlannerVariables:
    """The environment variables of the planner, checked.

    `detailed_log`: 0 none, 1 on the console, 2 in the file autoconfig_log.dump. `memory_percent`: of a device's memory, that a
    plan may use. `threads`: that cost the candidates at the same time, at most.
    """

    detailed_log: int
    memory_percent: int
    threads: int


_enabled: ParallelOptions | None = None


def enable_advanced_parallelization(
    *,
    pipeline_parallel: bool = True,
    num_stages: int | Auto = "auto",
    num_micro_batches: int | Auto = "auto",
    activation_recomputation: bool | Auto = "auto",
    distribute_parameter: bool | Auto = "auto",
    mixed_precision: bool = True,
    skip_padding: bool = True,
    pack_rows: bool = True,
    share_prefix: bool = True,
    logits_at_labels: bool = True,
    sparse_embedding: bool = True,
    block_attention: bool = True,
    fused_activation: bool = True,
    fused_norm: bool = True,
    fused_rotary: bool = True,
    fused_optimizer: bool = True,
    keep_freed_memory: bool = True,
    **unknown: Any,
) -> None:
    """Plan and run the models of this process on all devices of the accelerator. Call it once, before a model is made.

    With several workers (MOREH_WORKERS, by default the number of GPUs, else one) the script is started again in each of them,
    and this process waits for them and ends as they did: nothing after this line runs in it. A process that was started
    as a worker, by this function or by torchrun, joins the others here.

    The plan is made for the accelerator, and the options restrict it.

    Args:
        pipeline_parallel: whether stages of a model may be put on different devices.
        num_stages: the number of pipeline stages.
        num_micro_batches: the number of micro-batches that a batch is cut into.
        activation_recomputation: recompute activations in the backward pass instead of keeping them ("auto": the planner
            decides, for the accelerator and for this machine).
        distribute_parameter: shard parameters, gradients and optimizer state over data-parallel ranks.
        mixed_precision: compute in bfloat16 with float32 weights, where the machine multiplies bfloat16 matrices faster.
        skip_padding: order the rows of a batch by their length and compute nothing behind a row's last label.
        pack_rows: on processors, put rows one after the other instead of side by side, so that none is padded to the length of
            another.
        share_prefix: compute the tokens that all of these packed rows of a batch begin with, such as an instruction, once.
        logits_at_labels: compute the output layer and the MLP of the last layer only where labels are.
        sparse_embedding: on one worker, add the gradient of token embeddings that are the output layer's weights, too, to its
            gradient row by row instead of as a matrix of mostly zeros.
        block_attention: on processors, compute causal attention as matrix products of blocks instead of in torch's own kernel.
        fused_activation: compute the GELU of GPT-2 with one rounding instead of eight operations; on processors, keep less for
            the SwiGLU of Llama.
        fused_norm: on processors, compute the RMSNorm of Llama with fewer passes and keep only its result.
        fused_rotary: on processors, compute the rotary embedding of Llama with fewer passes.
        fused_optimizer: use the fused kernels of torch in Adam and AdamW, where the script has chosen none.
        keep_freed_memory: on processors, keep the memory that a step frees for the next one instead of giving it back to the
            system (with glibc, where no environment variable says otherwise).
        unknown: catches options that do not exist, to name the one that was meant.

    Raises:
        OptionError: an option is unknown, its value or that of an environment variable is not allowed, or several workers
            are wanted in a session that has no script to start again.
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
        skip_padding,
        pack_rows,
        share_prefix,
        logits_at_labels,
        sparse_embedding,
        block_attention,
        fused_activation,
        fused_norm,
        fused_rotary,
        fused_optimizer,
        keep_freed_memory,
    )
    _check_values(options)
    variables = planner_variables()
    workers = _workers_to_start()
    if _enabled == options:
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
    install_hook(options, variables)
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
        raise OptionError(
            f"num_stages={options.num_stages!r} with pipeline_parallel=False: stages need pipeline_parallel=True"
        )


def planner_variables() -> PlannerVariables:
    """The planner's settings from the environment.

    Raises:
        OptionError: one of them is no number, or outside of its range.
    """
    return PlannerVariables(
        detailed_log=_number_in_environment("DETAILED_LOG", default=0, least=0, most=2),
        memory_percent=_number_in_environment("MEMORY_USAGE_CORRECTION_RATIO", default=80, least=1, most=100),
        threads=_number_in_environment("MAX_PARALLEL_COMPILE_THREADS", default=16, least=1, most=1024),
    )


def _number_in_environment(name: str, *, default: int, least: int, most: int) -> int:
    text = os.environ.get(_VARIABLE + name, str(default)).strip()
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        raise OptionError(
            f"{_VARIABLE}{name}={text!r}: allowed is a whole number from {least} to {most}; {default} if unset"
        )
    return int(text)


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
            "CUDA_VISIBLE_DEVICES to nothing to compute on the processor"
        )
    return int(text)
