"""The options of the hook and the environment variables of planner and launcher, with their types and meanings.

Nothing here imports torch, so a settings file with an error is rejected before torch is loaded.
"""

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from moreh.errors import OptionError

Auto = Literal["auto"]
# The maximum number of workers on one machine. Each worker is a process that imports torch.
MAX_WORKERS = 256
# The share of a device's memory that a plan may use: the platform's default. The rest is for uncounted memory and for
# errors of predicted memory. Not counted are the context and kernels of CUDA or ROCm, buffers of NCCL, workspaces of
# matmuls, and blocks that torch's allocator cannot use. Errors are up to 10 % in
# tests/benchmarks/test_planner_accuracy.py.
DEFAULT_MEMORY_PERCENT = 80
_VARIABLE_PREFIX = "MOREH_ADVANCED_PARALLELIZATION_"
ENABLE_VARIABLE = "MOREH_ENABLE_ADVANCED_PARALLELIZATION"
PLATFORM_LINES_VARIABLE = "MOREH_PLATFORM_LINES"
MAX_RESTARTS_VARIABLE = "MOREH_MAX_RESTARTS"
HANG_VARIABLE = "MOREH_HANG_SECONDS"
# A script may do other things than to train for a long time, such as to prepare data in one worker.
DEFAULT_HANG_S = 3600.0

# What an option allows, as errors word it.
SWITCH = "True or False"
SWITCH_OR_AUTO = 'True, False or "auto"'
COUNT_OR_AUTO = 'a whole number from 1, or "auto"'
NAMES = "a list of optimizations"

OPTIMIZATIONS: Mapping[str, str] = {
    "skip_padding": "Tokens after a sequence's last label are dropped: in a causal model they cannot affect the loss.",
    "pack_rows": "Sequences are packed into rows of equal length instead of being padded to the longest one (CPU).",
    "share_prefix": "Tokens that every sequence of a batch begins with are computed once per packed row (CPU).",
    "logits_at_labels": "The output layer and the last layer's MLP are computed only at label positions.",
    "sparse_embedding": "With tied embeddings on one worker, the input embedding's gradient is scatter-added into the "
    "output layer's instead of materializing a second dense [vocabulary, hidden] gradient.",
    "block_attention": "Causal attention is computed as batched matmuls over blocks of queries (CPU).",
    "fused_activation": "GPT-2's tanh-GELU is one operation with one rounding instead of eight.",
    "fused_norm": "Llama's RMSNorm is one operation that saves only its input (CPU).",
    "fused_lora": "A linear layer with a LoRA adapter is one operation without casts of activations (CPU).",
    "fused_optimizer": "Adam and AdamW use torch's fused kernels, unless the script chose an implementation.",
    "keep_freed_memory": "glibc keeps the memory freed by a step for the next step (CPU).",
}
"""The optimizations by name. Each changes losses and gradients by rounding only; the option `disable` turns it off."""


def _option(default: Any, allowed: str, doc: str) -> Any:
    return field(default=default, metadata={"allowed": allowed, "doc": doc})


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """The options of `enable_advanced_parallelization`; each field's metadata has its allowed values and its effect."""

    pipeline_parallel: bool = _option(True, SWITCH, "Allow splitting the layers into pipeline stages.")
    num_stages: int | Auto = _option("auto", COUNT_OR_AUTO, "Number of pipeline ranks; fewer if no plan has that many.")
    num_micro_batches: int | Auto = _option(
        "auto", COUNT_OR_AUTO, "Number of micro-batches per batch; fewer if no plan has that many."
    )
    activation_recomputation: bool | Auto = _option(
        "auto",
        SWITCH_OR_AUTO,
        'Recompute activations in the backward pass instead of storing them. With "auto", the planner decides.',
    )
    distribute_parameter: bool | Auto = _option(
        "auto", SWITCH_OR_AUTO, "Shard parameters, gradients and optimizer state over data-parallel ranks."
    )
    mixed_precision: bool = _option(
        True, SWITCH, "Compute in bfloat16 with float32 weights if bfloat16 matmuls are faster on this machine."
    )
    disable: tuple[str, ...] = _option(
        (), NAMES, f"Optimizations to turn off for debugging: any of {', '.join(OPTIMIZATIONS)}."
    )

    def uses(self, optimization: str) -> bool:
        """True if an optimization is on."""
        assert optimization in OPTIMIZATIONS, optimization
        return optimization not in self.disable

    def optimizations_text(self) -> str:
        """The log line about the optimizations."""
        return f"Optimizations : all but {', '.join(self.disable)}" if self.disable else "Optimizations : all"


DEFAULT_OPTIONS = ParallelOptions()


@dataclass(frozen=True, kw_only=True)
class PlannerVariables:
    """The planner's environment variables, checked."""

    detailed_log: int
    """The place of the list of the best candidates: 0 none, 1 the console, 2 the file autoconfig_log.dump."""
    memory_percent: int
    """The share of a device's memory that a plan may use, in percent."""
    threads: int
    """The maximum number of threads that compute the costs of candidates."""
    platform_lines: bool = True
    """MOREH_PLATFORM_LINES: the platform's lines about the search, or one line of the plan in their place."""


def parse_options(options: Mapping[str, Any]) -> ParallelOptions:
    """Check the options of a call.

    Raises:
        OptionError: an option does not exist, its value is not allowed, or two options contradict each other.
    """
    known = {option.name: option for option in fields(ParallelOptions)}
    for name, value in options.items():
        if name not in known:
            raise OptionError(
                f"unknown option {name}={value!r}{did_you_mean(name, known) or '.'} The options are: {', '.join(known)}"
                + (f'. To switch an optimization off, give disable=("{name}",)' if name in OPTIMIZATIONS else "")
            )
    values = {name: _checked(name, value, known[name].metadata["allowed"]) for name, value in options.items()}
    parsed = ParallelOptions(**values)
    if not parsed.pipeline_parallel and parsed.num_stages not in ("auto", 1):
        raise OptionError(
            f"num_stages={parsed.num_stages!r} with pipeline_parallel=False: stages need pipeline_parallel=True"
        )
    return parsed


def _checked(name: str, value: Any, allowed: str) -> Any:
    if allowed == NAMES:
        return _checked_names(name, value)
    is_auto = isinstance(value, str) and value == "auto"
    if allowed == COUNT_OR_AUTO:
        is_valid = is_auto or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)
    else:
        is_valid = isinstance(value, bool) or (allowed == SWITCH_OR_AUTO and is_auto)
    if not is_valid:
        raise OptionError(f"{name}={value!r}: expected {allowed}")
    return value


def _checked_names(name: str, value: Any) -> tuple[str, ...]:
    """The optimizations of a list, in the order in which they are declared, so that equal sets are equal options."""
    if not isinstance(value, list | tuple | set | frozenset):
        raise OptionError(f"{name}={value!r}: expected {NAMES}, such as ({next(iter(OPTIMIZATIONS))!r},)")
    for item in value:
        if item not in OPTIMIZATIONS:
            raise OptionError(
                f"{name}={value!r}: there is no optimization {item!r}{did_you_mean(str(item), OPTIMIZATIONS) or '.'} "
                f"The optimizations are: {', '.join(OPTIMIZATIONS)}"
            )
    return tuple(optimization for optimization in OPTIMIZATIONS if optimization in value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that an unknown one is close to, as the end of a sentence; empty if there is none.

    >>> did_you_mean("batchsize", ["batch_size", "lr"])
    '; did you mean batch_size?'
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def is_switched_off() -> bool:
    """True if MOREH_ENABLE_ADVANCED_PARALLELIZATION=0 is set, which runs a script as if it did not call the hook."""
    return os.environ.get(ENABLE_VARIABLE, "").strip() == "0"


def planner_variables() -> PlannerVariables:
    """Read the planner's environment variables.

    Raises:
        OptionError: a variable is not a whole number, or is out of range.
    """
    return PlannerVariables(
        detailed_log=_number_in_environment("DETAILED_LOG", default=0, minimum=0, maximum=2),
        memory_percent=_number_in_environment(
            "MEMORY_USAGE_CORRECTION_RATIO", default=DEFAULT_MEMORY_PERCENT, minimum=1, maximum=100
        ),
        threads=_number_in_environment("MAX_PARALLEL_COMPILE_THREADS", default=16, minimum=1, maximum=1024),
        platform_lines=_shows_platform_lines(),
    )


@dataclass(frozen=True, kw_only=True)
class LaunchVariables:
    """The launcher's environment variables, checked."""

    max_restarts: int
    """MOREH_MAX_RESTARTS: how often the workers are started again after one of them has died or hung."""
    hang_seconds: float | None
    """MOREH_HANG_SECONDS: how long all workers may be silent before they are ended; None (0): for ever."""


def launch_variables() -> LaunchVariables:
    """Read the launcher's environment variables.

    Raises:
        OptionError: a variable is not a number, or is out of range.
    """
    restarts = os.environ.get(MAX_RESTARTS_VARIABLE, "0").strip()
    if not (restarts.isascii() and restarts.isdecimal()):
        raise OptionError(f"{MAX_RESTARTS_VARIABLE}={restarts!r}: expected a whole number from 0; 0 if unset")
    text = os.environ.get(HANG_VARIABLE, "").strip()
    try:
        seconds = float(text) if text else DEFAULT_HANG_S
    except ValueError:
        seconds = math.nan
    if not (0 <= seconds < math.inf):
        raise OptionError(
            f"{HANG_VARIABLE}={text!r}: expected a number of seconds from 0 (never); {DEFAULT_HANG_S:g} if unset"
        )
    return LaunchVariables(max_restarts=int(restarts), hang_seconds=seconds or None)


def _shows_platform_lines() -> bool:
    text = os.environ.get(PLATFORM_LINES_VARIABLE, "").strip()
    if text not in ("", "0", "1"):
        raise OptionError(
            f"{PLATFORM_LINES_VARIABLE}={text!r}: expected 0 (one line of the plan) or 1 (the platform's lines); 1 "
            "if unset"
        )
    return text != "0"


def _number_in_environment(name: str, *, default: int, minimum: int, maximum: int) -> int:
    value = os.environ.get(_VARIABLE_PREFIX + name, str(default)).strip()
    if not (value.isascii() and value.isdecimal() and minimum <= int(value) <= maximum):
        raise OptionError(
            f"{_VARIABLE_PREFIX}{name}={value!r}: expected a whole number from {minimum} to {maximum}; "
            f"{default} if unset"
        )
    return int(value)
