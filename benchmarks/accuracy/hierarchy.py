"""The constants of all programs and classes of devices together: a population, and draws from it.

The unconstrained constants of a program on a class of devices are the sum of five Gaussian draws: what all have in
common, and what is particular to the generation of the devices, to the class, to the program, and to the program on
that generation. The logarithm of a step time is taken as linear in them. Then what rows say about any of these draws
has a closed form (Rasmussen and Williams 2006, chapter 2, https://gaussianprocess.org/gpml).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from published_runs import PublishedRun

from accuracy.priors import GENERATIONS, prior_mean, width
from moreh.planner.calibration.sensitivity import log_step_time, log_step_time_slopes
from moreh.planner.hardware.efficiency import Efficiency
from moreh.planner.hardware.efficiency_distribution import (
    CONSTANTS,
    EfficiencyDistribution,
    from_unconstrained,
    to_unconstrained,
)
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.arrays import BoolArray, FloatArray


@dataclass(frozen=True)
class Spreads:
    """Standard deviations of the draws, as multiples of `WIDTH`; `noise` and `models` are those of a log step time."""

    programs: float
    noise: float
    population: float = 1.0
    generations: float = 1.0
    classes: float = 0.2
    pairs: float = 0.3
    """Standard deviation of a program's draw for a generation."""
    models: float = 0.03
    """Standard deviation that the steps of one model with one program on one class share."""
    hosts: float = 3.0
    """Ratio of the standard deviations of host times and of other constants between programs: one program captures
    graphs, another runs Python for each kernel."""
    usual_host: float = 0.5
    """The same as `population`, for the times of hosts: that layers take hosts about a millisecond is known."""


# The constants that are times of hosts.
HOSTS = np.array([name in ("layer_host_s", "step_host_s") for name in CONSTANTS])
# The spreads that `choose_spreads` tries.
CHOICES = tuple(Spreads(programs, noise) for programs, noise in product((0.35, 0.5, 0.7), (0.04, 0.06)))


@dataclass(frozen=True)
class Labels:
    """The draws that a step time depends on."""

    program: str
    class_name: str
    model: str
    strangeness: float = 1.0
    """Distance of the program from the population, relative to the usual: above 1 if `strange_labels` finds one."""

    @property
    def generation(self) -> str:
        """The generation of the class."""
        return GENERATIONS.get(self.class_name, self.class_name)

    @property
    def step(self) -> str:
        """The program, the class and the model in one text."""
        return "/".join((self.program, self.class_name, self.model))


@dataclass(frozen=True, eq=False)
class Rows:
    """Runs with their step times, linear around the constants at which they were predicted."""

    labels: tuple[Labels, ...]
    slopes: FloatArray
    """Derivatives of the logarithm of the step time by the unconstrained constants, [rows, constants]."""
    seconds: FloatArray
    """Logarithm of measured over predicted seconds, where the prediction is the linear one with prior constants,
    [rows]."""

    def take(self, chosen: BoolArray) -> "Rows":
        """Some of the rows."""
        labels = tuple(label for label, keep in zip(self.labels, chosen, strict=True) if keep)
        return Rows(labels, self.slopes[chosen], self.seconds[chosen])

    def of_program(self, program: str) -> BoolArray:
        """True for the rows of a program, [rows]."""
        return np.array([label.program == program for label in self.labels])

    @property
    def programs(self) -> list[str]:
        """All programs, in their order."""
        return list(dict.fromkeys(label.program for label in self.labels))


@dataclass(frozen=True, eq=False)
class Posterior:
    """A Gaussian over the unconstrained constants of a program on a class of devices."""

    mean: FloatArray
    """[constants]"""
    covariance: FloatArray
    """[constants, constants]"""


def labels_of(run: PublishedRun) -> Labels:
    """The draws that a run depends on."""
    return Labels(run.program, run.cluster.device.efficiency_class, run.training.architecture.name)


def linear_rows(runs: Sequence[PublishedRun], constants: Sequence[Efficiency]) -> Rows:
    """Runs that give a step time, predicted with constants of each run."""
    labels = tuple(labels_of(run) for run in runs)
    slopes, seconds = np.zeros((len(runs), len(CONSTANTS))), np.zeros(len(runs))
    for index, (run, efficiency) in enumerate(zip(runs, constants, strict=True)):
        environment = Environment(run.cluster, efficiency, run.software)
        times = [log_step_time(plan, run.training, environment) for plan in run.plans]
        fastest = run.plans[int(np.argmin(times))]
        slopes[index] = log_step_time_slopes(fastest, run.training, environment)
        distance = to_unconstrained(efficiency) - prior_mean(labels[index].class_name)
        assert run.step_time_s is not None
        seconds[index] = np.log(run.step_time_s) - min(times) + slopes[index] @ distance
    return Rows(labels, slopes, seconds)


def _equal(first: Sequence[str], second: Sequence[str]) -> BoolArray:
    """True where two names are the same, [first, second]."""
    numbers = {name: number for number, name in enumerate({*first, *second})}
    mine, theirs = (np.array([numbers[name] for name in names]) for names in (first, second))
    return np.asarray(mine[:, None] == theirs[None, :])


@dataclass(frozen=True, eq=False)
class _Shared:
    """Covariance of the unconstrained constants of two lists of labels, in units of `WIDTH` squared, [first, second].

    The covariance that all programs have in common comes on top.
    """

    devices: FloatArray
    """Draws of generations and classes: none of the times of hosts, which have the same processors."""
    programs: FloatArray
    """Draws of programs: `Spreads.hosts` squared times as much of the times of hosts."""

    def of(self, hosts: bool, spreads: Spreads) -> FloatArray:
        """The covariance, for the times of hosts or for other constants."""
        if hosts:
            return spreads.usual_host**2 + spreads.hosts**2 * self.programs
        return spreads.population**2 + self.devices + self.programs


def _shared(first: Sequence[Labels], second: Sequence[Labels], spreads: Spreads) -> _Shared:

    def same(name: str) -> BoolArray:
        return _equal([getattr(label, name) for label in first], [getattr(label, name) for label in second])

    program, generation = same("program"), same("generation")
    strangeness = np.array([label.strangeness**2 for label in first])[:, None]
    return _Shared(
        spreads.generations**2 * generation + spreads.classes**2 * same("class_name"),
        strangeness * program * (spreads.programs**2 + spreads.pairs**2 * generation),
    )


def _covariance(first: Rows, second: Rows, spreads: Spreads) -> FloatArray:
    """Covariance of the step times of two sets of rows without noise, [first, second]."""
    scaled, shared = first.slopes * width() ** 2, _shared(first.labels, second.labels, spreads)
    weighted = sum(
        scaled[:, chosen] @ second.slopes[:, chosen].T * shared.of(hosts, spreads)
        for hosts, chosen in ((True, HOSTS), (False, ~HOSTS))
    )
    models = _equal([label.step for label in first.labels], [label.step for label in second.labels])
    return np.asarray(weighted + spreads.models**2 * models)


def posterior(rows: Rows, of: Labels, spreads: Spreads) -> Posterior:
    """The posterior of a program on a class, given rows. Either may be new to the rows."""
    sigma, shared = width(), _shared([of], [of], spreads)
    own = np.where(HOSTS, shared.of(True, spreads)[0, 0], shared.of(False, spreads)[0, 0])
    if not len(rows.labels):
        return Posterior(prior_mean(of.class_name), np.diag(own * sigma**2))
    inverse = np.linalg.inv(_covariance(rows, rows, spreads) + spreads.noise**2 * np.eye(len(rows.labels)))
    shared = _shared([of], rows.labels, spreads)
    common = np.where(HOSTS[:, None], shared.of(True, spreads), shared.of(False, spreads))
    cross = sigma[:, None] ** 2 * rows.slopes.T * common
    gain = cross @ inverse
    covariance = np.diag(own * sigma**2) - gain @ cross.T
    return Posterior(prior_mean(of.class_name) + gain @ rows.seconds, (covariance + covariance.T) / 2)


def predict_rows(known: Rows, rows: Rows, spreads: Spreads) -> tuple[FloatArray, FloatArray]:
    """Mean and variance of the logarithms of step times, as in `Rows.seconds`, given other rows; [rows] each."""
    noise = spreads.noise**2
    cross = _covariance(known, rows, spreads)
    gain = np.linalg.solve(_covariance(known, known, spreads) + noise * np.eye(len(known.labels)), cross)
    variance = np.diag(_covariance(rows, rows, spreads)) - np.sum(gain * cross, axis=0) + noise
    return gain.T @ known.seconds, variance


def strange_labels(rows: Rows, spreads: Spreads) -> Rows:
    """The rows with the strangeness of their programs: programs are draws of a distribution with heavy tails.

    A program whose step times are far from what all other programs predict says little about the population.
    """
    labels = list(rows.labels)
    for program in rows.programs:
        left = rows.of_program(program)
        mean, variance = predict_rows(rows.take(~left), rows.take(left), spreads)
        deviations = float(np.sqrt(np.mean((rows.seconds[left] - mean) ** 2 / variance)))
        for index in np.flatnonzero(left):
            labels[index] = replace(labels[index], strangeness=max(1.0, deviations))
    return Rows(tuple(labels), rows.slopes, rows.seconds)


def blind_density(rows: Rows, spreads: Spreads) -> float:
    """Mean log density of the step times of each program given all other programs; the heavy tails of Student's t."""
    degrees = 4.0
    total = 0.0
    for program in rows.programs:
        left = rows.of_program(program)
        mean, variance = predict_rows(rows.take(~left), rows.take(left), spreads)
        squares = (rows.seconds[left] - mean) ** 2 / variance
        total += float(np.sum(-(degrees + 1) / 2 * np.log1p(squares / degrees) - np.log(variance) / 2))
    return total / len(rows.labels)


def choose_spreads(rows: Rows) -> Spreads:
    """The spreads with which each program is predicted best from the others."""
    return max(CHOICES, key=lambda spreads: blind_density(rows, spreads))


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Everything that a set of runs says."""

    rows: Rows
    spreads: Spreads

    def of(self, program: str, class_name: str) -> Posterior:
        """The posterior of a program on a class; a program without runs is any program."""
        known = {label.program: label.strangeness for label in self.rows.labels}
        return posterior(self.rows, Labels(program, class_name, "", known.get(program, 1.0)), self.spreads)

    def distribution(self, program: str, class_name: str) -> EfficiencyDistribution:
        """The posterior as the planner stores it."""
        found = self.of(program, class_name)
        noise = float(np.hypot(self.spreads.noise, self.spreads.models))
        return EfficiencyDistribution(from_unconstrained(found.mean), found.covariance, noise)


def prior_rows(runs: Sequence[PublishedRun]) -> Rows:
    """Runs with slopes at the prior, which know nothing of any measured figure."""
    priors = {name: from_unconstrained(prior_mean(name)) for name in {labels_of(run).class_name for run in runs}}
    return linear_rows(runs, [priors[labels_of(run).class_name] for run in runs])


def fit_hierarchy(runs: Sequence[PublishedRun], first: Rows | None = None) -> Hierarchy:
    """Fit all constants to runs: with slopes at the prior, then with slopes at the constants of that fit.

    Args:
        first: `prior_rows` of the runs, if they are known.
    """
    rough = _fit(first or prior_rows(runs))
    labels = [labels_of(run) for run in runs]
    pairs = {(label.program, label.class_name) for label in labels}
    constants = {pair: from_unconstrained(rough.of(*pair).mean) for pair in pairs}
    return _fit(linear_rows(runs, [constants[label.program, label.class_name] for label in labels]))


def _fit(rows: Rows) -> Hierarchy:
    spreads = choose_spreads(rows)
    return Hierarchy(strange_labels(rows, spreads), spreads)
