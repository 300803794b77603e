"""What the tests of the command-line tools share."""

import functools
import json

import pytest

from moreh.cli import plan_command
from moreh.planner.report.flavor_comparison import compare_flavors
from tests.helpers.planner.plan_tool import runner, write_model


@pytest.fixture
def model(tmp_path):
    """The path of a small model's configuration."""
    return write_model(tmp_path)


@pytest.fixture
def flavors_compared_once(monkeypatch):
    """The flavors of a request are compared once, for tests of how they are shown."""
    monkeypatch.setattr(plan_command, "compare_flavors", compared)


@functools.cache
def compared(request):
    return compare_flavors(request)


@pytest.fixture
def plan(state_directory, monkeypatch, capsys):
    """Run moreh-plan; returns exit code, standard output and standard error."""
    return runner(monkeypatch, capsys)


@pytest.fixture
def plan_json(plan):
    """Run moreh-plan with --json; returns the content of a run that succeeds."""

    def run_tool(*arguments):
        code, out, err = plan(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run_tool
