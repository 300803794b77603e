"""The user's constraints on the search.

This module imports no torch, so that `--plan-only` and `moreh-plan` can show a plan in a second.
"""

from dataclasses import dataclass

from moreh.options import DEFAULT_MEMORY_PERCENT, ParallelOptions, PlannerVariables
from moreh.planner.plan.plan import SCHEDULES, Schedule


@dataclass(frozen=True)
class Constraints:
    """Limits on the plans that the search considers. None leaves a choice to the search."""

    pipeline: int | None = None
    """Number of pipeline stages on different ranks."""
    micro_batches: int | None = None
    """Number of micro-batches in a step."""
    recompute: bool | None = None
    """True for selective or full recomputation, False for none."""
    shard_parameters: bool | None = None
    """True for sharded parameters (ZeRO-3), False for any other sharding or none."""
    max_tensor: int | None = None
    """Largest tensor-parallel size; None for no limit."""
    max_context: int = 1
    """Largest context-parallel size. 1 by default, because the local runtime has no context parallelism."""
    max_micro_batch_tokens: int | None = None
    """Most tokens of a micro-batch of several sequences without a pipeline; None for no limit."""
    max_expert: int = 1
    """Largest expert-parallel size. 1 by default, because the local runtime has no expert parallelism."""
    sequence_parallel: bool | None = None
    """True for plans with sequence parallelism, False for plans without."""
    memory_fraction: float = DEFAULT_MEMORY_PERCENT / 100
    """The share of a device's memory that a plan may use (0 to 1)."""
    schedules: tuple[Schedule, ...] = SCHEDULES
    """The pipeline schedules that the search may choose from."""


def constraints_from_options(options: ParallelOptions, variables: PlannerVariables, devices: int) -> Constraints:
    """The constraints that the hook's options and the environment variables set for `devices` devices."""

    def number_or_none(value: int | str) -> int | None:
        return value if isinstance(value, int) else None

    def bool_or_none(value: bool | str) -> bool | None:
        return value if isinstance(value, bool) else None

    return Constraints(
        pipeline=number_or_none(options.num_stages) if options.pipeline_parallel else 1,
        micro_batches=number_or_none(options.num_micro_batches),
        recompute=bool_or_none(options.activation_recomputation),
        # A single device has no other device to share parameters with, which is no reason to refuse.
        shard_parameters=bool_or_none(options.distribute_parameter) if devices > 1 else None,
        memory_fraction=variables.memory_percent / 100,
    )


def constraints_text(constraints: Constraints) -> str:
    """The constraints that differ from the defaults, separated by commas; empty if none does."""
    texts = []
    if constraints.pipeline is not None:
        texts.append(f"stages {constraints.pipeline}")
    if constraints.micro_batches is not None:
        texts.append(f"micro-batches {constraints.micro_batches}")
    for name, choice in (
        ("recomputation", constraints.recompute),
        ("sharded parameters", constraints.shard_parameters),
    ):
        if choice is not None:
            texts.append(name if choice else f"no {name}")
    if constraints.max_tensor is not None:
        texts.append(f"tensor at most {constraints.max_tensor}")
    if set(constraints.schedules) != set(SCHEDULES):
        texts.append(f"schedules {', '.join(constraints.schedules)}")
    if constraints.max_context != 1:
        texts.append(f"context at most {constraints.max_context}")
    if constraints.max_expert != 1:
        texts.append(f"experts over at most {constraints.max_expert} ranks")
    return ", ".join(texts)
