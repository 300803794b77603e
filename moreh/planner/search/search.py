"""The search for the fastest plans that fit in memory."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from moreh.errors import PlanError
from moreh.planner.cost.memory.memory_parts import PeakMemory
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.cost.pipeline_bounds import PipelineTable, makespan_lower_bound
from moreh.planner.cost.prediction import Prediction, predict_row, step_seconds
from moreh.planner.cost.stage_time import StageTime, stage_time
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.search.candidates import candidate_tables, divisors
from moreh.planner.search.constraints import Constraints
from moreh.planner.search.relaxations import helpful_relaxations
from moreh.planner.search.request import Request

# Plans whose step times differ relatively by less than this are tied; the first one found, which is simpler, wins.
TIE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class SearchResult:
    """The best plans, the number of candidates, and the duration of the search."""

    best: tuple[Prediction, ...]
    """The fastest plans that fit in memory, fastest first. Empty if none fits."""
    candidates: int
    """Number of plans that satisfy the constraints."""
    possible: int
    """Number of candidates that fit in memory."""
    smallest_bytes: float
    """The smallest memory of any candidate on its fullest device, in bytes."""
    memory_s: float
    """Seconds spent on enumerating the candidates and computing their memory."""
    search_s: float
    """Seconds spent on computing step times and finding the fastest plans."""


@dataclass(frozen=True)
class SearchOutcome:
    """The result of a search and the devices that it uses."""

    result: SearchResult
    environment: Environment
    """The environment with the devices in use."""
    idle: str
    """The reason why some devices stay idle; empty if none does."""


@dataclass(frozen=True)
class _CostedTable:
    """A table of plans that fit in memory, with their costs."""

    table: PlanTable
    times: StageTime
    needed: PeakMemory
    bounds_s: FloatArray
    """Lower bounds of the step times, [n]; the step times themselves for plans without a pipeline."""


def search(
    training: Training,
    environment: Environment,
    constraints: Constraints | None = None,
    count: int = 10,
    threads: int = 1,
) -> SearchResult:
    """The `count` fastest plans that fit in memory.

    1. Compute the memory of all candidates, one table at a time, and drop those that do not fit.
    2. Compute lower bounds of the step times of the others, one table at a time, in `threads` threads.
    3. Simulate pipelines in the order of their bounds, until the next bound exceeds the slowest of the best `count`
       plans so far: no remaining candidate can be among them.

    Raises:
        PlanError: the batch cannot be split over the devices, or no plan satisfies the constraints.
    """
    constraints = constraints or Constraints()
    start = time.perf_counter()
    limit = environment.cluster.device.memory_bytes * constraints.memory_fraction
    fitting: list[tuple[PlanTable, PeakMemory]] = []
    candidates, smallest = 0, np.inf
    for table in candidate_tables(environment.roofline, environment.cluster, training, constraints):
        needed = peak_memory(table, training, environment.software)
        total = needed.total.max(axis=1)
        candidates += len(table)
        smallest = min(smallest, float(total.min()))
        fits = np.flatnonzero(total <= limit)
        if len(fits):
            fitting.append((table.take(fits), needed.take(fits)))
    memory_checked = time.perf_counter()

    if threads == 1:
        costed = [_cost_table(table, needed, training, environment) for table, needed in fitting]
    else:
        with ThreadPoolExecutor(threads) as pool:
            costed = list(pool.map(lambda entry: _cost_table(entry[0], entry[1], training, environment), fitting))
    best = _fastest(costed, count)
    predictions = tuple(
        predict_row(costed[i].table, row, costed[i].times, costed[i].needed, training, environment)
        for _, i, row in best
    )
    return SearchResult(
        best=predictions,
        candidates=candidates,
        possible=sum(len(entry.table) for entry in costed),
        smallest_bytes=smallest,
        memory_s=memory_checked - start,
        search_s=time.perf_counter() - memory_checked,
    )


def search_on_most_devices(
    training: Training,
    environment: Environment,
    constraints: Constraints | None = None,
    count: int = 10,
    threads: int = 1,
) -> SearchOutcome:
    """`search` on all devices or, for a small batch or model, on the largest number of devices that can be used.

    Raises:
        PlanError: no plan satisfies the constraints on any number of devices.
    """
    devices = environment.cluster.devices
    reason: PlanError | None = None
    for used in reversed(divisors(devices)):
        smaller = environment.with_devices(used)
        try:
            result = search(training, smaller, constraints, count, threads)
        except PlanError as error:
            reason = reason or error
            continue
        idle = f"{devices - used} of {devices} devices stay idle: {reason}" if reason else ""
        return SearchOutcome(result, smaller, idle)
    assert reason is not None
    raise reason


def search_plans(request: Request, count: int) -> SearchOutcome:
    """The best plans of a request, on all devices or on as many as can be used.

    Raises:
        PlanError: no plan satisfies the constraints. The message names constraints to drop.
    """
    try:
        outcome = search_on_most_devices(request.training, request.environment, request.constraints, count)
    except PlanError as error:
        relaxations = helpful_relaxations(request, all_devices=False)
        raise PlanError(f"{error}; there are plans {relaxations}" if relaxations else str(error)) from None
    if not outcome.idle:
        return outcome
    # What remains of the error is why devices are idle, without its advice.
    idle = outcome.idle.partition(": give ")[0].removesuffix(" as asked")
    relaxations = helpful_relaxations(request, all_devices=True)
    return replace(outcome, idle=f"{idle}; there are plans on all devices {relaxations}" if relaxations else idle)


def _cost_table(table: PlanTable, needed: PeakMemory, training: Training, environment: Environment) -> _CostedTable:
    times = stage_time(environment.roofline, environment.cluster, table, training)
    if table.pipeline == 1:
        pipeline_s = table.micro_batches * (times.forward_s[:, 0] + times.backward_s[:, 0])
    else:
        pipeline_s = makespan_lower_bound(
            PipelineTable(
                schedule=table.schedule,
                ranks=table.pipeline,
                chunks=table.chunks,
                micro_batches=table.micro_batches,
                forward_s=times.forward_s,
                backward_s=times.backward_s,
                weight_fraction=times.weight_fraction[:, None],
                send_s=times.send_s,
            )
        )
    return _CostedTable(table, times, needed, np.maximum(pipeline_s, times.all_work_s) + times.tail_s)


def _fastest(costed: list[_CostedTable], count: int) -> list[tuple[float, int, int]]:
    """The `count` fastest rows as (step seconds, index into `costed`, row), fastest first."""
    if not costed:
        return []
    bounds = np.concatenate([entry.bounds_s for entry in costed])
    tables = np.repeat(np.arange(len(costed)), [len(entry.table) for entry in costed])
    rows = np.concatenate([np.arange(len(entry.table)) for entry in costed])
    best: list[tuple[float, int, int]] = []
    # A stable sort: among equal bounds the simpler schedules, which come first, are tried first.
    for index in np.argsort(bounds, kind="stable"):
        if len(best) == count and bounds[index] > best[-1][0] * (1 + TIE_TOLERANCE):
            break
        entry, row = costed[tables[index]], int(rows[index])
        seconds = float(bounds[index]) if entry.table.pipeline == 1 else step_seconds(entry.table, row, entry.times)
        position = len(best)
        while position > 0 and seconds < best[position - 1][0] * (1 - TIE_TOLERANCE):
            position -= 1
        best.insert(position, (seconds, int(tables[index]), row))
        del best[count:]
    return best
