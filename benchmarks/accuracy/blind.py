"""Predictions of runs of a program that is not known, and of the others once a few of its runs were measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from published_runs import PublishedRun

from accuracy.hierarchy import fit_hierarchy, prior_rows
from moreh.planner.calibration.calibrate import condition
from moreh.planner.calibration.prediction import DEVIATIONS
from moreh.planner.calibration.sensitivity import log_step_time, log_step_time_slopes
from moreh.planner.calibration.support import least_factor
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.hardware.efficiency_distribution import EfficiencyDistribution, prior_for
from moreh.planner.hardware.environment import Environment, make_environment
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan import Plan
from moreh.planner.plan.plan_table import PlanTable

# How many runs of a program on a class of devices are measured, and how often they are drawn.
SHOTS = (1, 3)
DRAWS = 25
SEED = 0


@dataclass(frozen=True)
class BlindRun:
    """A run with a measured step time, predicted without any run of its program."""

    run: PublishedRun
    seconds: float
    """Predicted seconds of a step."""
    low: float
    """The lower end of the interval, in seconds."""
    high: float
    """The upper end of the interval, in seconds."""

    @property
    def error(self) -> float:
        """Relative error of the step time."""
        assert self.run.step_time_s is not None
        return self.seconds / self.run.step_time_s - 1

    @property
    def covered(self) -> bool:
        """True if the measured step time lies in the interval."""
        assert self.run.step_time_s is not None
        return self.low <= self.run.step_time_s <= self.high


@dataclass(frozen=True)
class Group:
    """The runs of a program on a class of devices, as draws of calibration runs see them."""

    name: tuple[str, str]
    """The program and the class."""
    zero_shot: tuple[BlindRun, ...]
    errors: dict[int, FloatArray]
    """For each number of measured runs: relative errors of the others, [draws, runs]; NaN for the measured ones."""
    covered: dict[int, FloatArray]
    """In the same way, 1 if the measured step time lies in the interval, else 0."""


def fastest_plan(run: PublishedRun, environment: Environment) -> Plan:
    """The fastest plan of a run that fits in memory: most rows leave only one."""
    if len(run.plans) == 1:
        return run.plans[0]
    limit = run.cluster.device.memory_bytes
    fitting = [
        plan
        for plan in run.plans
        if peak_memory(PlanTable.from_plans([plan]), run.training, run.software).total.max() <= limit
    ]
    return min(fitting or run.plans, key=lambda plan: log_step_time(plan, run.training, environment))


def shipped_prior(run: PublishedRun) -> EfficiencyDistribution:
    """The prior that the planner ships, for any program on the devices of a run."""
    return prior_for(make_environment(run.cluster, run.software))


def blind_group(runs: Sequence[PublishedRun], prior: EfficiencyDistribution) -> Group:
    """Predict the runs of one program on one class of devices."""
    count = len(runs)
    slopes, predicted, least = np.zeros((count, len(prior.covariance))), np.zeros(count), np.zeros(count)
    for index, run in enumerate(runs):
        environment = Environment(run.cluster, prior.median, run.software)
        plan = fastest_plan(run, environment)
        predicted[index] = log_step_time(plan, run.training, environment)
        slopes[index] = log_step_time_slopes(plan, run.training, environment)
        least[index] = np.log(least_factor(plan, run.training, environment)[0])
    measured = np.log([run.step_time_s or np.nan for run in runs])

    def half_widths(covariance: FloatArray) -> FloatArray:
        variance = np.einsum("ij,jk,ik->i", slopes, covariance, slopes) + prior.noise_std**2
        return np.maximum(DEVIATIONS * np.sqrt(variance), least)

    half = half_widths(prior.covariance)
    zero_shot = tuple(
        BlindRun(run, *np.exp([center, center - width, center + width]).tolist())
        for run, center, width in zip(runs, predicted, half, strict=True)
    )
    generator = np.random.default_rng(SEED)
    errors, covered = {}, {}
    for shots in SHOTS:
        if count <= shots:
            continue
        errors[shots], covered[shots] = np.full((DRAWS, count), np.nan), np.full((DRAWS, count), np.nan)
        for draw in range(DRAWS):
            known = generator.choice(count, shots, replace=False)
            shift, covariance = condition(prior, slopes[known], measured[known] - predicted[known])
            others = np.setdiff1d(np.arange(count), known)
            distance = (predicted + slopes @ shift - measured)[others]
            errors[shots][draw, others] = np.exp(distance) - 1
            covered[shots][draw, others] = np.abs(distance) <= half_widths(covariance)[others]
    return Group((runs[0].program, runs[0].cluster.device.efficiency_class), zero_shot, errors, covered)


def grouped(runs: Sequence[PublishedRun]) -> dict[tuple[str, str], list[PublishedRun]]:
    """Runs that give a step time, by program and class of devices."""
    groups: dict[tuple[str, str], list[PublishedRun]] = {}
    for run in runs:
        if run.step_time_s is not None:
            groups.setdefault((run.program, run.cluster.device.efficiency_class), []).append(run)
    return groups


def with_shipped_constants(runs: Sequence[PublishedRun]) -> list[Group]:
    """Every group, predicted with the constants of the planner."""
    return [blind_group(rows, shipped_prior(rows[0])) for rows in grouped(runs).values()]


def leaving_programs_out(
    runs: Sequence[PublishedRun], unfitted: str, report: Callable[[str], None] = lambda _: None
) -> list[Group]:
    """Every group, predicted with constants that are fitted to all other programs.

    Args:
        unfitted: A program that no fit uses.
        report: What is called with the name of each program.
    """
    timed = [run for run in runs if run.step_time_s is not None]
    first = prior_rows(timed)
    groups = []
    for program in dict.fromkeys(run.program for run in timed):
        report(program)
        others = np.array([run.program not in (program, unfitted) for run in timed])
        known = [run for run, other in zip(timed, others, strict=True) if other]
        hierarchy = fit_hierarchy(known, first.take(others))
        own = grouped([run for run in timed if run.program == program])
        groups += [blind_group(rows, hierarchy.distribution(program, name)) for (_, name), rows in own.items()]
    return groups
