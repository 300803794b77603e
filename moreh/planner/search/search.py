"""The best plans of all candidates."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from moreh.errors import PlanError
from moreh.planner.cost.memory import Memory, memory
from moreh.planner.cost.pipeline_bounds import makespan_lower_bound
from moreh.planner.cost.prediction import Environment, Prediction, predict_row, step_seconds
from moreh.planner.cost.stage_time import StageTime, stage_time
from moreh.planner.plan.arrays import Floats
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.search.candidates import Constraints, candidate_tables

# Two plans whose times differ by less than this, relatively, are equal: the first one found, which is the simpler one, wins.
EQUAL = 1e-9


@dataclass(frozen=True)
class SearchResult:
    """The best plans, fastest first, of `possible` ones that fit in memory among `candidates`; and the seconds it took.

    `smallest_bytes` is the least that any candidate needs on its fullest device, to say by how much nothing fits.
    """

    best: tuple[Prediction, ...]
    candidates: int
    possible: int
    smallest_bytes: float
    memory_s: float
    search_s: float


@dataclass(frozen=True)
class _Costed:
    """A table of plans that fit, with their costs and lower bounds of their step times, [n]."""

    table: PlanTable
    times: StageTime
    needed: Memory
    bounds_s: Floats


def search(
    training: Training, setting: Environment, restrictions: Constraints | None = None, count: int = 10, threads: int = 1
) -> SearchResult:
    """The `count` fastest plans that fit in memory; candidates are costed by so many `threads`.

    Every candidate has a lower bound of its step time, at once for all of a table; the pipelines of the candidates are then
    simulated in the order of their bounds, until the next bound is above the slowest of the best `count`: what is left out
    cannot be among them.

    Raises:
        PlanError: the batch cannot be divided, or nothing satisfies the restrictions.
    """
    restrictions = restrictions or Constraints()
    started = time.perf_counter()
    limit = setting.cluster.device.memory_bytes * restrictions.memory_fraction
    tables: list[tuple[PlanTable, Memory]] = []
    candidates, smallest = 0, np.inf
    for table in candidate_tables(setting.roofline, setting.cluster, training, restrictions):
        needed = memory(table, training, setting.implementation)
        total = needed.total.max(axis=1)
        candidates += len(table)
        smallest = min(smallest, float(total.min()))
        fits = np.flatnonzero(total <= limit)
        if len(fits):
            tables.append((table.rows(fits), needed.rows(fits)))
    checked = time.perf_counter()

    if threads == 1:
        costed = [_cost(table, needed, training, setting) for table, needed in tables]
    else:
        with ThreadPoolExecutor(threads) as pool:
            costed = list(pool.map(lambda entry: _cost(entry[0], entry[1], training, setting), tables))
    best = _fastest(costed, count)
    predictions = tuple(
        predict_row(costed[i].table, row, costed[i].times, costed[i].needed, training, setting) for _, i, row in best
    )
    return SearchResult(
        best=predictions,
        candidates=candidates,
        possible=sum(len(entry.table) for entry in costed),
        smallest_bytes=smallest,
        memory_s=checked - started,
        search_s=time.perf_counter() - checked,
    )


def search_on_most_devices(
    training: Training, setting: Environment, restrictions: Constraints | None = None, count: int = 10, threads: int = 1
) -> tuple[SearchResult, Environment, str]:
    """`search` on all devices, or on as many as a small batch and model can be divided over; the others stay idle.

    Besides the result: the setting with the devices in use, and why not all of them are (empty where they are).

    Raises:
        PlanError: nothing satisfies the restrictions on any number of devices.
    """
    devices = setting.cluster.devices
    reason: PlanError | None = None
    for used in (number for number in range(devices, 0, -1) if devices % number == 0):
        smaller = replace(setting, cluster=replace(setting.cluster, devices=used))
        try:
            found = search(training, smaller, restrictions, count, threads)
        except PlanError as error:
            reason = reason or error
            continue
        return found, smaller, f"{devices - used} of {devices} devices stay idle: {reason}" if reason else ""
    assert reason is not None
    raise reason


def _cost(table: PlanTable, needed: Memory, training: Training, setting: Environment) -> _Costed:
    times = stage_time(setting.roofline, setting.cluster, table, training)
    if table.pipeline == 1:
        pipeline_s = table.micro_batches * (times.forward_s[:, 0] + times.backward_s[:, 0])
    else:
        pipeline_s = makespan_lower_bound(
            table.schedule,
            table.pipeline,
            table.micro_batches,
            table.chunks,
            times.forward_s,
            times.backward_s,
            times.weight_fraction[:, None],
            times.send_s,
        )
    return _Costed(table, times, needed, pipeline_s + times.tail_s)


def _fastest(costed: list[_Costed], count: int) -> list[tuple[float, int, int]]:
    """(seconds, table, row) of the `count` fastest rows."""
    if not costed:
        return []
    bounds = np.concatenate([entry.bounds_s for entry in costed])
    tables = np.repeat(np.arange(len(costed)), [len(entry.table) for entry in costed])
    rows = np.concatenate([np.arange(len(entry.table)) for entry in costed])
    best: list[tuple[float, int, int]] = []
    # A stable sort: among equal bounds the simpler schedules, which come first, are tried first.
    for place in np.argsort(bounds, kind="stable"):
        if len(best) == count and bounds[place] > best[-1][0] * (1 + EQUAL):
            break
        entry, row = costed[tables[place]], int(rows[place])
        seconds = float(bounds[place]) if entry.table.pipeline == 1 else step_seconds(entry.table, row, entry.times)
        position = len(best)
        while position > 0 and seconds < best[position - 1][0] * (1 - EQUAL):
            position -= 1
        best.insert(position, (seconds, int(tables[place]), row))
        del best[count:]
    return best
