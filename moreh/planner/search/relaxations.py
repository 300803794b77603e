"""Finds the constraints that leave no plan, to suggest dropping them."""

from collections.abc import Iterator
from dataclasses import replace

from moreh.errors import PlanError
from moreh.planner.search.candidates import candidate_tables, divisors
from moreh.planner.search.request import Request


def helpful_relaxations(request: Request, *, all_devices: bool) -> str:
    """The options each of which, left out alone, gives the request a plan, such as "without --stages 3".

    Args:
        all_devices: Whether only plans on all devices count, or also plans that leave devices idle.

    Returns:
        The options joined by ", or "; empty if no single option helps.
    """
    constraints = request.constraints
    relaxed = {
        f"without --stages {constraints.pipeline}": replace(constraints, pipeline=None),
        f"without --micro-batches {constraints.micro_batches}": replace(constraints, micro_batches=None),
        "without --shard-parameters yes": replace(constraints, shard_parameters=None),
        f"without --max-tensor {constraints.max_tensor}": replace(constraints, max_tensor=None),
        "with a larger --max-context": replace(
            constraints, max_context=max(constraints.max_context, request.environment.cluster.devices)
        ),
        "with a larger --max-expert": replace(
            constraints, max_expert=max(constraints.max_expert, request.environment.cluster.devices)
        ),
    }
    requests = ((text, replace(request, constraints=other)) for text, other in relaxed.items() if other != constraints)
    return ", or ".join(
        text
        for text, relaxed_request in requests
        if any(has_candidates(smaller) for smaller in on_usable_devices(relaxed_request, all_devices=all_devices))
    )


def on_usable_devices(request: Request, *, all_devices: bool = False) -> Iterator[Request]:
    """The request on all devices and then, unless `all_devices`, on each smaller number that divides them."""
    for devices in reversed(divisors(request.environment.cluster.devices)):
        yield request.with_devices_in_use(devices)
        if all_devices:
            return


def has_candidates(request: Request) -> bool:
    """True if any plan on all devices satisfies the constraints, whether it fits in memory or not."""
    environment = request.environment
    tables = candidate_tables(environment.roofline, environment.cluster, request.training, request.constraints)
    try:
        return next(tables, None) is not None
    except PlanError:
        return False
