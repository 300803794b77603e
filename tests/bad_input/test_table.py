"""Each bad input of the table has its exit code and its words, and none shows a traceback."""

import sys

import pytest

from tests.bad_input.cases import all_cases
from tests.bad_input.running import TRACEBACK, run_tool
from tests.conftest import ROOT

CASES = all_cases()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_is_refused_in_a_line(case, tiny_run, tmp_path, state_directory):
    settings, sources = tiny_run
    arguments = case.prepare(tmp_path, sources)
    code, errors = run_tool(case.tool, arguments, settings, case.input)
    assert TRACEBACK not in errors, errors
    assert code == case.code, errors
    assert case.says.replace("{dir}", str(tmp_path)) in errors
    assert errors.replace("\n", "").isprintable()
    lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 or lines[0].startswith("usage: "), errors


def test_table_is_long():
    assert len(CASES) >= 400
    assert len({(case.tool, tuple(case.arguments), case.name) for case in CASES}) > 400


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (["train_gpt.py", "train.lr=fast"], 2, "error: command line: train.lr: 'fast' is not allowed"),
        (
            ["-m", "moreh.cli.plan_command", "/no/such.json", "--batch-size", "8", "--sequence-length", "8"],
            1,
            "error: ",
        ),
        (["-m", "utils.report", "/no/such"], 2, "error: /no/such: there is no config.yaml"),
        (["-m", "moreh.cli.smi", "-i", "9"], 1, "error: no accelerator 9"),
    ],
)
def test_command_does_what_its_main_function_does(run_process, command, code, says):
    finished = run_process(sys.executable, *command, cwd=ROOT)
    assert finished.returncode == code
    assert says in finished.stderr
    assert TRACEBACK not in finished.stderr
    assert finished.stdout == ""
