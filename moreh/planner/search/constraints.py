"""What the hook's options leave to the search of a plan. It needs no torch, so that a plan can be shown in a second."""

from moreh.options import ParallelOptions, PlannerVariables
from moreh.planner.search.candidates import Constraints


def constraints_from_options(options: ParallelOptions, variables: PlannerVariables, devices: int) -> Constraints:
    """What the hook's options and the environment leave to the search on so many devices."""

    def fixed(value: int | str) -> int | None:
        return value if isinstance(value, int) else None

    def decided(value: bool | str) -> bool | None:
        return value if isinstance(value, bool) else None

    return Constraints(
        pipeline=fixed(options.num_stages) if options.pipeline_parallel else 1,
        micro_batches=fixed(options.num_micro_batches),
        recompute=decided(options.activation_recomputation),
        # A single device has no others to share with, which is no reason to refuse.
        shard_parameters=decided(options.distribute_parameter) if devices > 1 else None,
        memory_fraction=variables.memory_percent / 100,
    )
