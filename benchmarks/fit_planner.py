"""Fit the planner's constants to published measurements: `python benchmarks/fit_planner.py RUNS.csv`.

All rows are used. The constants of each class of devices are those of a program that nobody has measured, and come with
their covariance (accuracy/hierarchy.py). How far predictions are off is found by leaving out one program at a time
(planner_accuracy.py). The result is written to moreh/planner/hardware/data/efficiency.json.

    python benchmarks/fit_planner.py benchmarks/data/published_runs.csv
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from accuracy.hierarchy import CHOICES, Hierarchy, fit_hierarchy, posterior
from accuracy.measured_memory import memory_of_kind
from published_runs import PublishedRun, read_rows, usable_runs

from moreh.accelerator.devices import all_devices
from moreh.planner.calibration.sensitivity import log_step_time
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.hardware.efficiency import MIN_RUNS_FOR_QUANTILE, Efficiency
from moreh.planner.hardware.efficiency_distribution import from_unconstrained
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.units import GIB

OUTPUT = Path(__file__).parent.parent / "moreh" / "planner" / "hardware" / "data" / "efficiency.json"
# A program that is not used. The platform does not say enough about how it computes.
LEFT_OUT = "MoAI Platform"
# The least spread of memory between programs and between rows of one: there are few programs to tell it from.
LEAST_MEMORY_SPREAD = 0.1


def usable_for_fitting(runs: Sequence[PublishedRun]) -> list[PublishedRun]:
    """Runs with a step time, without the program that is left out."""
    return [run for run in runs if run.step_time_s is not None and run.program != LEFT_OUT]


def blind_errors(hierarchy: Hierarchy, runs: Sequence[PublishedRun]) -> FloatArray:
    """Relative errors of step times when each program is predicted from all others, [rows]."""
    rows, errors = hierarchy.rows, np.zeros(len(runs))
    for program in rows.programs:
        left = rows.of_program(program)
        constants: dict[str, Efficiency] = {}
        for index in np.flatnonzero(left).tolist():
            run, label = runs[index], replace(rows.labels[index], strangeness=1.0)
            if label.class_name not in constants:
                found = posterior(rows.take(~left), label, hierarchy.spreads)
                constants[label.class_name] = from_unconstrained(found.mean)
            environment = Environment(run.cluster, constants[label.class_name], run.software)
            seconds = min(log_step_time(plan, run.training, environment) for plan in run.plans)
            errors[index] = np.exp(seconds) / (run.step_time_s or np.nan) - 1
    return errors


def errors_of_classes(
    hierarchy: Hierarchy, runs: Sequence[PublishedRun], classes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The errors of predictions for programs that were left out: the fields of `Uncertainty`, for each class."""
    errors = blind_errors(hierarchy, runs)
    table = {}
    for name in classes:
        own = errors[[label.class_name == name for label in hierarchy.rows.labels]]
        known = own if len(own) else errors
        share = 1.0 if 0 < len(own) < MIN_RUNS_FOR_QUANTILE else 0.8
        figures = {"error": np.quantile(np.abs(known), share), "lowest": known.min(), "highest": known.max()}
        table[name] = {"runs": len(own), **{key: rounded(value) for key, value in figures.items()}}
    return table


def memory_spread(runs: Sequence[PublishedRun]) -> dict[str, float]:
    """Mean and spreads of the logarithm of measured over predicted memory: the fields of `MemorySpread`."""
    ratios: dict[str, list[float]] = {}
    for run in runs:
        if run.memory_gib is not None and len(run.plans) == 1:
            needed = peak_memory(PlanTable.from_plans(run.plans), run.training, run.software)
            predicted = memory_of_kind(run.memory_kind, run.plans[0], needed)
            ratios.setdefault(run.program, []).append(float(np.log(run.memory_gib * GIB / predicted)))
    means = [float(np.mean(values)) for values in ratios.values()]
    rest = [value - mean for values, mean in zip(ratios.values(), means, strict=True) for value in values]
    return {
        "mean": rounded(float(np.mean(means))),
        "programs": rounded(max(LEAST_MEMORY_SPREAD, float(np.std(means)))),
        "rows": rounded(max(LEAST_MEMORY_SPREAD / 2, float(np.std(rest)))),
    }


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def main(arguments: Sequence[str]) -> int:
    """Fit and write the constants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", type=Path, help="a file of published runs")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    runs = [run for _, run, _ in usable_runs(read_rows(options.runs)) if run is not None]
    chosen = usable_for_fitting(runs)
    hierarchy = fit_hierarchy(chosen)
    spreads = hierarchy.spreads
    classes = sorted({device.efficiency_class for device in all_devices().values()})
    priors = {name: hierarchy.distribution("", name) for name in classes}
    for name, prior in priors.items():
        print(f"{name}: {prior.median}")
    print(f"spread between programs {spreads.programs}, noise {spreads.noise}, of {len(CHOICES)} choices")
    table = {
        "source": f"benchmarks/fit_planner.py {options.runs.name}",
        "fitted_rows": [run.digest for run in chosen],
        "errors": errors_of_classes(hierarchy, chosen, classes),
        "constants": {
            name: {key: rounded(value) for key, value in asdict(prior.median).items()} for name, prior in priors.items()
        },
        "noise": rounded(next(iter(priors.values())).noise_std),
        "memory": memory_spread(runs),
        "covariances": {
            name: [[rounded(value) for value in row] for row in prior.covariance.tolist()]
            for name, prior in priors.items()
        },
    }
    # A matrix has a line for each of its rows.
    text = re.sub(r"\[\s+([-\d.e,\s]+?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", json.dumps(table, indent=1))
    options.out.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
