"""Helpers of the tests of moreh-plan: a small model, a training step, running the tool, and reading its tables."""

import json
import sys

from moreh.accelerator.flavors import find_flavor
from moreh.cli import plan_command
from moreh.models.describe.from_source import describe
from moreh.planner.hardware.cluster import cluster_for_flavor
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.search.search import search

MODEL = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "vocab_size": 4000,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
STEP = ("--batch-size", "48", "--sequence-length", "128")
LLAMA = (
    "configs/models/llama3_70b.json",
    "--accelerator",
    "8xLarge.4096GB",
    "--batch-size",
    "512",
    "--sequence-length",
    "1024",
)


def write_model(directory):
    """The path of the small model's configuration."""
    path = directory / "small.json"
    path.write_text(json.dumps(MODEL), encoding="utf-8")
    return str(path)


def runner(monkeypatch, capsys):
    """A function that runs the tool; it returns the exit code and what was written on both streams."""

    def run_tool(*arguments, columns=100):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["moreh-plan", *map(str, arguments)])
        try:
            code = plan_command.main()
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return run_tool


def table_rows(text):
    """The cells of the rows of a printed table, headers first. The lines of a wrapped cell are joined."""
    rows = []
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if rows and not cells[0]:
                rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
            else:
                rows.append(cells)
    return rows


def sentences_below_table(text):
    """The text below a table, a string for each line."""
    return text.split("+\n")[-1].splitlines()


def plan_of(content):
    """The plan of a JSON object."""
    return Plan(**{**content["plan"], "stage_layers": tuple(content["plan"]["stage_layers"])})


def search_result(model, flavor, count=10):
    """The result of the search for a model's STEP on an accelerator."""
    training = Training(describe(model), 48, 128)
    return search(training, make_environment(cluster_for_flavor(find_flavor(flavor))), count=count)
