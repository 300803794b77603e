"""Fit the planner's efficiency constants to published measurements: `python benchmarks/fit_planner.py RUNS.csv`.

Every second run of each group is used; the others are left for testing (benchmarks/planner_accuracy.py). Each class of
devices gets one set of constants, the most probable one given its rows and a prior. The prior is the set of the class
it descends from, or `PRIOR`, with `WIDTH` (a Gaussian on the logarithm, or on the log-odds of a fraction). The result
is written to moreh/planner/hardware/data/efficiency.json.

    python benchmarks/fit_planner.py benchmarks/data/published_runs.csv
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from published_runs import PublishedRun, read_rows, usable_runs
from scipy.optimize import least_squares

from moreh.accelerator.devices import all_devices
from moreh.planner.cost.prediction import step_seconds
from moreh.planner.cost.stage_time import stage_time
from moreh.planner.hardware.efficiency import MIN_RUNS_FOR_QUANTILE, Efficiency
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan_table import PlanTable

OUTPUT = Path(__file__).parent.parent / "moreh" / "planner" / "hardware" / "data" / "efficiency.json"

# What is usual on GPUs, and by how much it may be wrong: one standard deviation of the logarithm or of half the
# log-odds. Both are judgment. The width of attention was narrowed after errors of all rows had been seen.
PRIOR = Efficiency(
    matmul=0.75,
    float8=0.55,
    matmul_depth=150,
    matmul_waves=0.3,
    attention=0.35,
    memory=0.8,
    kernel_s=4e-6,
    node=0.75,
    network=0.75,
    node_hop_s=2e-6,
    network_hop_s=6e-6,
    contention=0.3,
    skew=0.03,
    partial_node=0.5,
)
WIDTH = Efficiency(
    matmul=0.3,
    float8=0.3,
    matmul_depth=0.7,
    matmul_waves=0.7,
    attention=0.2,
    memory=0.3,
    kernel_s=0.5,
    node=0.3,
    network=0.3,
    node_hop_s=0.7,
    network_hop_s=0.7,
    contention=0.8,
    skew=0.8,
    partial_node=0.7,
)
FRACTIONS = ("matmul", "float8", "attention", "memory", "node", "network", "contention")
# The classes whose prior is another class: the same chip with other memory or another power limit.
PARENTS = {"A100 40GB": "A100 80GB", "H100 96GB": "H100", "H200": "H100"}
# Groups that are not used. The platform does not say enough about how it computes.
LEFT_OUT = ("Moreh docs MI250",)
# Relative error that a published figure is taken to have; larger ones count less than quadratically.
NOISE = 0.04


def select_runs_to_fit(runs: Sequence[PublishedRun]) -> list[PublishedRun]:
    """Every second run of each group, from the second on, without the groups that are left out.

    Rows about the same plan of the same program, such as a log and a summary of it, count as one run and stay together.
    """
    groups: dict[str, dict[object, list[PublishedRun]]] = {}
    for run in runs:
        identity = (run.training, run.plans, run.cluster, run.software)
        groups.setdefault(run.group, {}).setdefault(identity, []).append(run)
    chosen = [rows for name, group in groups.items() if name not in LEFT_OUT for rows in list(group.values())[1::2]]
    return [run for rows in chosen for run in rows]


def step_time_s(run: PublishedRun, efficiency: Efficiency) -> float:
    """The predicted seconds of a step: of the fastest plan if the row leaves the micro-batch size open."""
    table = PlanTable.from_plans(run.plans)
    environment = Environment(run.cluster, efficiency, run.software)
    times = stage_time(environment.roofline, run.cluster, table, run.training)
    return min(step_seconds(table, row, times) for row in range(len(table)))


def to_coordinates(efficiency: Efficiency) -> FloatArray:
    """The logarithm of each constant, or the log-odds of a fraction."""
    values = asdict(efficiency)
    return np.array([np.log(v / (1 - v)) if name in FRACTIONS else np.log(v) for name, v in values.items()])


def from_coordinates(coordinates: FloatArray) -> Efficiency:
    """The inverse of `to_coordinates`."""
    names = [field.name for field in fields(Efficiency)]
    pairs = zip(names, coordinates.tolist(), strict=True)
    return Efficiency(**{name: float(1 / (1 + np.exp(-v)) if name in FRACTIONS else np.exp(v)) for name, v in pairs})


def fit(runs: Sequence[PublishedRun], prior: Efficiency) -> Efficiency:
    """The most probable constants, given the runs and a prior."""
    center = to_coordinates(prior)
    width = np.array([v * (2 if name in FRACTIONS else 1) for name, v in asdict(WIDTH).items()])

    def residuals(steps: FloatArray) -> FloatArray:
        efficiency = from_coordinates(center + steps * width)
        errors = [np.log(step_time_s(run, efficiency) / run.step_time_s) / NOISE for run in runs if run.step_time_s]
        return np.concatenate([errors, steps])

    solution = least_squares(residuals, np.zeros(len(center)), loss="soft_l1", diff_step=1e-3)
    return from_coordinates(center + solution.x * width)


def errors_of_classes(
    runs: Sequence[PublishedRun], fitted: set[str], constants: dict[str, Efficiency]
) -> dict[str, dict[str, float]]:
    """How far predictions are off for runs that were not fitted: the fields of `Uncertainty`, for each class."""
    tested = [run for run in runs if run.digest not in fitted]

    def errors(rows: Sequence[PublishedRun], efficiency: Efficiency) -> list[float]:
        return [step_time_s(run, efficiency) / run.step_time_s - 1 for run in rows if run.step_time_s]

    table = {}
    for name, efficiency in constants.items():
        own_errors = errors([run for run in tested if run.cluster.device.efficiency_class == name], efficiency)
        known = own_errors or errors(tested, PRIOR)
        share = 1.0 if 0 < len(own_errors) < MIN_RUNS_FOR_QUANTILE else 0.8
        figures = {"error": np.quantile(np.abs(known), share), "lowest": min(known), "highest": max(known)}
        table[name] = {"runs": len(own_errors), **{key: float(f"{value:.3g}") for key, value in figures.items()}}
    return table


def main(arguments: Sequence[str]) -> int:
    """Fit and write the constants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", type=Path, help="a file of published runs")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    runs = [run for _, run, _ in usable_runs(read_rows(options.runs)) if run is not None and run.step_time_s]
    chosen = select_runs_to_fit(runs)
    classes = sorted(
        {device.efficiency_class for device in all_devices().values()}, key=lambda name: (name in PARENTS, name)
    )
    constants: dict[str, Efficiency] = {}
    for name in classes:
        rows = [run for run in chosen if run.cluster.device.efficiency_class == name]
        prior = constants[PARENTS[name]] if name in PARENTS else PRIOR
        constants[name] = fit(rows, prior) if rows else prior
        print(f"{name}: {len(rows)} rows; {constants[name]}", flush=True)
    table = {
        "source": f"benchmarks/fit_planner.py {options.runs.name}",
        "fitted_rows": [run.digest for run in chosen],
        "errors": errors_of_classes(runs, {run.digest for run in chosen}, constants),
        "constants": {
            name: {key: float(f"{value:.4g}") for key, value in asdict(row).items()} for name, row in constants.items()
        },
    }
    options.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
