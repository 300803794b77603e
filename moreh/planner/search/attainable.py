"""Lowers options for stages and micro-batches that no plan can have exactly."""

from collections.abc import Iterator
from dataclasses import replace

from moreh.planner.search.candidates import divisors
from moreh.planner.search.constraints import Constraints
from moreh.planner.search.relaxations import has_candidates, on_usable_devices
from moreh.planner.search.request import Request


def attainable(request: Request, *, all_devices: bool = False) -> Request:
    """The request with the largest numbers of stages and micro-batches that some plan has, at most those asked for.

    Micro-batches are lowered first. A request that has no plan with fewer of them either is returned as it is, and the
    search says why.

    Args:
        all_devices: Whether a plan has to use all devices.
    """
    for constraints in _at_most(request.constraints, request.training.global_batch_size):
        lowered = replace(request, constraints=constraints)
        if any(has_candidates(smaller) for smaller in on_usable_devices(lowered, all_devices=all_devices)):
            return lowered
    return request


def _at_most(asked: Constraints, batch_size: int) -> Iterator[Constraints]:
    """The constraints with as many stages and micro-batches as asked, then with fewer."""
    # A batch is cut into equal micro-batches.
    sizes = [size for size in reversed(divisors(batch_size)) if size < (asked.micro_batches or 0)]
    for stages in [None] if asked.pipeline is None else range(asked.pipeline, 0, -1):
        for micro_batches in (asked.micro_batches, *sizes):
            yield replace(asked, pipeline=stages, micro_batches=micro_batches)


def lowered_options(asked: Constraints, attained: Constraints) -> list[str]:
    """A sentence about each option that was lowered."""
    numbers = {
        "num_stages": (asked.pipeline, attained.pipeline),
        "num_micro_batches": (asked.micro_batches, attained.micro_batches),
    }
    return [
        f"{name}={before}: no plan of this training has so many under the options given; it is planned with {after}."
        for name, (before, after) in numbers.items()
        if before != after
    ]
