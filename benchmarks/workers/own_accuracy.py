"""Predicted against measured: the planner on the plans of this project's own runtime, on the cores of this machine.

python benchmarks/workers/own_accuracy.py [--workers 2 4 8] [--plans 14 5 2] [--steps 5] [--csv FILE]

Two models train on 2, 4 and 8 workers by plans of different kinds: tensor, pipeline and data parallelism, schedules,
sharding, recomputation, micro-batches. The step time is the median of the measured steps. The memory is the peak of
live tensors on the fullest worker. Workers have one thread each, and more workers than cores share the cores.
"""

import argparse
import csv
import itertools
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from team import Shape, Team

from moreh.planner.cost.prediction import Prediction, predict
from moreh.planner.hardware.environment import Environment, measured_environment
from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.search.candidates import candidate_tables
from moreh.planner.search.constraints import Constraints
from moreh.planner.search.search import search
from moreh.planner.software_profile import moreh_on_cpu
from moreh.planner.units import GIB
from moreh.runtime.batch.packing import max_row_tokens

SHAPES = {
    "8 layers of 512": Shape(
        layers=8, hidden=512, heads=8, intermediate=1408, vocabulary=8192, batch_size=8, sequence_length=256
    ),
    "4 layers of 768": Shape(
        layers=4, hidden=768, heads=12, intermediate=2048, vocabulary=16384, batch_size=8, sequence_length=256
    ),
}
WORKERS = (2, 4, 8)
PLANS = (14, 5, 2)


@dataclass(frozen=True)
class Measured:
    """A plan that was measured."""

    model: str
    """A key of SHAPES."""
    workers: int
    """Processes."""
    plan: str
    """The plan in `moreh-plan`'s notation."""
    predicted_s: float
    """Predicted seconds of a step."""
    measured_s: float
    """Median of the measured steps, in seconds."""
    predicted_gib: float
    """Predicted GiB of live tensors on the fullest worker."""
    measured_gib: float
    """Measured GiB of live tensors on the fullest worker."""

    @property
    def time_error(self) -> float:
        """Relative error of the step time; above 0 if the prediction is too slow."""
        return self.predicted_s / self.measured_s - 1

    @property
    def memory_error(self) -> float:
        """Relative error of the memory; above 0 if the prediction is too high."""
        return self.predicted_gib / self.measured_gib - 1


def main() -> None:
    """Measure the plans and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="numbers of workers (default: 2 4 8)")
    parser.add_argument(
        "--plans",
        type=int,
        nargs="+",
        default=PLANS,
        help="plans of each model on each number of workers (default: 14 5 2)",
    )
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each plan (default: 5)")
    parser.add_argument("--csv", type=Path, help="file for all rows")
    arguments = parser.parse_args()
    if len(arguments.plans) != len(arguments.workers):
        parser.error(f"--plans has {len(arguments.plans)} numbers: give one for each of {arguments.workers} workers")
    print("| model | workers | plan | predicted s | measured s | error | predicted GiB | measured GiB | error |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    rows: list[Measured] = []
    for workers, plans in zip(arguments.workers, arguments.plans, strict=True):
        for name, shape in SHAPES.items():
            rows += measure(name, shape, workers, plans, arguments.steps)
    print()
    print(summary(rows))
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


def measure(name: str, shape: Shape, workers: int, plans: int, steps: int) -> list[Measured]:
    """Measure plans of one model on one number of workers, and print a row of each."""
    environment = measured_environment(workers, moreh_on_cpu("float32"))
    training = shape.training(shape.build("meta"))
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        team = Team(workers, 1, f"{directory}/store")
        for prediction in chosen(training, environment, plans):
            plan = plan_text(prediction.plan)
            team.build(shape, plan)
            seconds = statistics.median(team.run(1)[0] for _ in range(steps))
            row = Measured(
                name,
                workers,
                plan,
                prediction.step_time_s,
                seconds,
                prediction.memory_bytes / GIB,
                team.peak_bytes(shape, plan) / GIB,
            )
            rows.append(row)
            print(
                f"| {name} | {workers} | `{plan}` | {row.predicted_s:.2f} | {row.measured_s:.2f} | "
                f"{row.time_error:+.0%} | {row.predicted_gib:.3f} | {row.measured_gib:.3f} | {row.memory_error:+.0%} |",
                flush=True,
            )
        team.stop()
    return rows


def chosen(training: Training, environment: Environment, count: int) -> list[Prediction]:
    """The plan that is predicted to be fastest, and `count - 1` others of different kinds; the same ones each time."""
    constraints = Constraints(max_micro_batch_tokens=max_row_tokens(training.sequence_length))
    fastest = search(training, environment, constraints, count=1).best[0]
    kinds: dict[tuple[object, ...], list[Plan]] = {}
    for table in candidate_tables(environment.roofline, environment.cluster, training, constraints):
        for plan in (table.plan(row) for row in range(len(table))):
            if plan != fastest.plan:
                kind = (plan.tensor, plan.pipeline, plan.data, plan.schedule, plan.sharding, plan.recomputation)
                kinds.setdefault(kind, []).append(plan)
    draw = random.Random(0)
    groups = draw.sample(list(kinds.values()), min(count - 1, len(kinds)))
    return [fastest, *(predict(draw.choice(group), training, environment) for group in groups)]


def summary(rows: Sequence[Measured]) -> str:
    """Errors by the number of workers, and how well the plans of each model and number of workers are ranked."""
    lines = [
        "| workers | plans | step time: mean | median | largest | bias | memory: median | largest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workers, group in itertools.groupby(rows, key=lambda row: row.workers):
        lines.append(error_row(str(workers), list(group)))
    lines += [
        error_row("all", rows),
        "",
        "| model | workers | plans | Kendall's tau | regret |",
        "|---|---|---|---|---|",
    ]
    for (model, workers), group in itertools.groupby(rows, key=lambda row: (row.model, row.workers)):
        plans = list(group)
        first = min(plans, key=lambda row: row.predicted_s).measured_s
        regret = first / min(row.measured_s for row in plans) - 1
        lines.append(f"| {model} | {workers} | {len(plans)} | {kendall_tau(plans):.2f} | {regret:.1%} |")
    return "\n".join(lines)


def error_row(name: str, rows: Sequence[Measured]) -> str:
    """A row of the table of errors."""
    times, memory = ([abs(getattr(row, field)) for row in rows] for field in ("time_error", "memory_error"))
    bias = statistics.mean(row.time_error for row in rows)
    return (
        f"| {name} | {len(rows)} | {statistics.mean(times):.1%} | {statistics.median(times):.1%} | {max(times):.1%} "
        f"| {bias:+.1%} | {statistics.median(memory):.1%} | {max(memory):.1%} |"
    )


def kendall_tau(rows: Sequence[Measured]) -> float:
    """Kendall's tau of predicted and measured step times: 1 for the same order, -1 for the reverse."""
    pairs = list(itertools.combinations(rows, 2))
    agreeing = sum((a.predicted_s < b.predicted_s) == (a.measured_s < b.measured_s) for a, b in pairs)
    return 2 * agreeing / len(pairs) - 1


if __name__ == "__main__":
    main()
