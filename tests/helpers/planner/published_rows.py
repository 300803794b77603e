"""Fixtures of the tests of published runs: the scripts of benchmarks/, the file of runs, and a row to change."""

import csv
import sys

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import planner_accuracy
import published_programs
import published_runs
from accuracy import blind, hierarchy, scores

__all__ = [
    "PUBLISHED_RUNS",
    "blind",
    "hierarchy",
    "make_row",
    "planner_accuracy",
    "published_programs",
    "published_runs",
    "scores",
]

PUBLISHED_RUNS = ROOT / "benchmarks" / "data" / "published_runs.csv"
ROW = {
    "group": "new",
    "framework": "Megatron-LM",
    "model": "GPT 1B",
    "layers": "24",
    "hidden": "2048",
    "heads": "16",
    "seq_len": "2048",
    "gpu": "A100-SXM4-80GB",
    "n_gpus": "16",
    "tp": "2",
    "pp": "2",
    "dp": "4",
    "mbs": "2",
    "gbs": "64",
    "precision": "bf16",
    "recompute": "full",
    "step_time_s": "2.0",
}


def make_row(**changes):
    """A row of a file of published runs that can be predicted, with other cells where given."""
    with PUBLISHED_RUNS.open(encoding="utf-8", newline="") as file:
        columns = csv.DictReader(file).fieldnames
    return {**dict.fromkeys(columns, ""), "id": "1", **ROW, **changes}
