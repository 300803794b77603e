"""Score the planner against published runs: `python benchmarks/planner_accuracy.py RUNS.csv [--out predictions.csv]`.

Each program on each class of devices is taken as new: its step times are predicted with the planner's constants, and
again after 1 and 3 of its rows were measured. RUNS.csv has the columns of benchmarks/data/published_runs.csv and may
hold any rows. Rows that cannot be predicted are listed with the reason.

The planner's constants are fitted to benchmarks/data/published_runs.csv. To score them on that file, each program is
predicted with constants that are fitted to all other programs, which takes some minutes:

    python benchmarks/planner_accuracy.py benchmarks/data/published_runs.csv --leave-one-program-out
"""

import argparse
import csv
import io
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from accuracy.blind import leaving_programs_out, with_shipped_constants
from accuracy.measured_memory import memory_of_kind
from accuracy.scores import error_line, score_lines, sweep_lines
from fit_planner import LEFT_OUT
from published_programs import cell
from published_runs import PublishedRun, failure, read_rows, usable_runs

from moreh.planner.calibration.prediction import Interval
from moreh.planner.calibration.prediction import predict as predict_with_interval
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.cost.prediction import Prediction, predict
from moreh.planner.hardware.efficiency import fitted_rows
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.units import GIB

COLUMNS = (
    "id",
    "predicted_step_time_s",
    "predicted_tokens_per_s_per_device",
    "predicted_memory_gib",
    "fits",
    "skipped_because",
    "step_time_low_s",
    "step_time_high_s",
    "interval_because",
)


@dataclass(frozen=True)
class Scored:
    """A run with its prediction."""

    run: PublishedRun
    prediction: Prediction
    memory_gib: float
    """Predicted GiB of the fullest device, of the kind that was measured."""
    tested: bool
    """True if the row was not used to fit the constants, under any id."""

    @property
    def time_error(self) -> float | None:
        """Relative error of the step time; None if none was published."""
        measured = self.run.step_time_s
        return None if measured is None else self.prediction.step_time_s / measured - 1

    @property
    def memory_error(self) -> float | None:
        """Relative error of the memory; None if none was published."""
        measured = self.run.memory_gib
        return None if measured is None else self.memory_gib / measured - 1

    @property
    def fits(self) -> bool:
        """True if the plan is predicted to fit in the device's memory."""
        return self.prediction.memory_bytes <= self.run.cluster.device.memory_bytes


def score(run: PublishedRun, fitted: frozenset[str]) -> Scored:
    """Predict a run. If the row leaves the micro-batch size open, the fastest of its plans that fit counts."""
    environment = make_environment(run.cluster, run.software)
    predictions = [predict(plan, run.training, environment) for plan in run.plans]
    fitting = [p for p in predictions if p.memory_bytes <= run.cluster.device.memory_bytes]
    fastest = min(fitting or predictions, key=lambda p: p.step_time_s)
    needed = peak_memory(PlanTable.from_plans([fastest.plan]), run.training, run.software)
    memory_gib = memory_of_kind(run.memory_kind, fastest.plan, needed) / GIB
    return Scored(run, fastest, memory_gib, run.digest not in fitted)


def score_or_reason(run: PublishedRun, fitted: frozenset[str]) -> tuple[Scored | None, str]:
    """A run with its prediction, or the reason why there is none. Never raises: one row does not stop the others."""
    try:
        scored = score(run, fitted)
        figures = (scored.prediction.step_time_s, scored.prediction.tokens_per_second, scored.prediction.memory_bytes)
    except Exception as error:
        return None, f"the prediction failed: {failure(error)}"
    if not all(0 < figure < math.inf for figure in figures):
        return None, "the prediction failed: it is not a finite positive number"
    return scored, ""


def interval(scored: Scored) -> tuple[Interval, str]:
    """The interval of a step time, and why it is not narrower."""
    environment = make_environment(scored.run.cluster, scored.run.software)
    known = predict_with_interval(scored.prediction.plan, scored.run.training, environment)
    return known.step_time_s, known.text


def print_errors(title: str, scored: Sequence[Scored], error: Callable[[Scored], float | None]) -> None:
    """A line for each group, and one for all."""
    print(f"\n{title}, absolute error in percent")
    print(f"{'group':42} {'rows':>5} {'median':>9} {'mean':>9} {'max':>9} {'bias':>9}")
    groups = dict.fromkeys(entry.run.group for entry in scored)
    for name in (*groups, None):
        line = error_line(
            "all" if name is None else name or "(no group)",
            (error(entry) for entry in scored if name in (None, entry.run.group)),
        )
        if line:
            print(line)


def write_predictions(path: Path, lines: Iterable[tuple[str, Scored | None, str]]) -> None:
    """Write one row for every row of the runs, in their order."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for name, scored, reason in lines:
            if scored is None:
                writer.writerow([name, "", "", "", "", reason, "", "", ""])
                continue
            # Of a unit as the row counts devices: a package may hold two.
            rate = scored.prediction.tokens_per_second / scored.run.units
            seconds = f"{scored.prediction.step_time_s:.6g}"
            ends, because = interval(scored)
            cells = [name, seconds, f"{rate:.6g}", f"{scored.memory_gib:.4g}", str(scored.fits).lower(), ""]
            writer.writerow([*cells, f"{ends.low:.6g}", f"{ends.high:.6g}", because])


def main(arguments: Sequence[str]) -> int:
    """Predict every row, print the scores and write the predictions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", type=Path, help="a file of published runs")
    parser.add_argument("--out", type=Path, help="write every prediction to this CSV file")
    parser.add_argument(
        "--leave-one-program-out",
        action="store_true",
        help="predict each program with constants that are fitted to the other programs of the file",
    )
    options = parser.parse_args(arguments)
    fitted = fitted_rows()
    lines: list[tuple[str, Scored | None, str]] = []
    for row, run, reason in usable_runs(read_rows(options.runs)):
        lines.append((cell(row, "id"), *((None, reason) if run is None else score_or_reason(run, fitted))))
    scored = [entry for _, entry, _ in lines if entry is not None]
    fitted_count = sum(not entry.tested for entry in scored)
    print(f"{len(lines)} rows: {len(scored)} predicted, of which {fitted_count} were used to fit the constants")
    for reason, count in Counter(reason for _, entry, reason in lines if entry is None).most_common():
        print(f"  {count} not predicted: {reason}")
    runs = [entry.run for entry in scored]
    if options.leave_one_program_out:
        print("\nStep time, in percent. The constants are fitted to all other programs of the file.")
        groups = leaving_programs_out(runs, LEFT_OUT)
    else:
        print("\nStep time, in percent. The constants are the planner's.")
        groups = with_shipped_constants(runs)
    for line in (*score_lines(groups), "", *sweep_lines(groups)):
        print(line)
    print_errors("Memory of the fullest device", scored, lambda entry: entry.memory_error)
    out_of_memory = [entry for entry in scored if entry.run.out_of_memory]
    if out_of_memory:
        wrong = [entry.run.id for entry in out_of_memory if entry.fits]
        print(f"\n{len(out_of_memory)} rows ran out of memory; predicted to fit: {', '.join(wrong) or 'none'}")
    ran = [entry for entry in scored if entry.run.step_time_s is not None and not entry.fits]
    print(f"\n{len(ran)} rows that ran are predicted not to fit: {', '.join(entry.run.id for entry in ran) or 'none'}")
    if options.out:
        write_predictions(options.out, lines)
        print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as error:  # a file that cannot be read or written, or a reader that has seen enough
        sys.exit(f"error: {error}")
