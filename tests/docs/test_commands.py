"""Every command of README, CONTRIBUTING and docs runs in a copy of the checkout; slow ones are marked so.

A block that begins with three backticks and `bash` is run page by page in its order, one that begins with `bash slow`
in `make docs-check` only, as are the commands of `MANY_PROCESSES`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.markdown import PAGES, blocks, commands

# Commands that would install packages or start this suite again: make only says what it would do.
DRY = {"make test": "make -n test", "make install": "make -n install", "make check": "make -n check"}
# Takes a minute of CPU time to start; tests/examples runs the script in copies of one process.
MANY_PROCESSES = {"MOREH_TRACE=1 MOREH_WORKERS=4 python examples/traced_step.py"}
# The environment is there already: make must not make it again.
OLD = "make -o .venv/installed -o .venv/installed-dev"


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the files of the repository, with the environment of the tests as its .venv."""
    directory = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.split("\n") if listed.returncode == 0 else []
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
    (directory / ".venv").symlink_to(sys.prefix)
    return directory


def shell(command, directory, state):
    command = DRY.get(command, command)
    if command.startswith("make ") and not command.startswith("make -n"):
        command = command.replace("make", OLD, 1)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MOREH_STATE_DIR": str(state),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        stdin=subprocess.DEVNULL,
    )


def run_page(page, directory, state, *, slow):
    """Run the quick commands of a page or, with slow ones among them, all."""
    for block, command, takes_long in commands_of(page):
        if slow or not takes_long:
            finished = shell(command, directory, state)
            assert finished.returncode == 0, (
                f"{page.name}:{block.line}: {command}\n{finished.stdout[-2000:]}\n{finished.stderr[-2000:]}"
            )


def commands_of(page):
    """Each command of a page with its block, and whether it takes long."""
    return [
        (block, command, block.language == "bash slow" or command in MANY_PROCESSES)
        for block in blocks(page)
        if block.language in {"bash", "bash slow"}
        for command in commands(block)
    ]


def pages_with(*, slow):
    return [page for page in PAGES if slow in {takes_long for _, _, takes_long in commands_of(page)}]


@pytest.mark.parametrize("page", pages_with(slow=False), ids=lambda page: page.name)
def test_quick_commands_run(page, checkout, environment):
    run_page(page, checkout, environment["MOREH_STATE_DIR"], slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with(slow=True), ids=lambda page: page.name)
def test_all_commands_run_in_their_order(page, checkout, environment):
    run_page(page, checkout, environment["MOREH_STATE_DIR"], slow=True)


def test_commands_with_many_processes_are_in_the_pages():
    assert {command for page in PAGES for _, command, _ in commands_of(page)} >= MANY_PROCESSES


def test_a_command_that_fails_is_seen(checkout, environment):
    assert shell("moreh-plan no-such-file.json", checkout, environment["MOREH_STATE_DIR"]).returncode != 0
    assert shell("false | true", checkout, environment["MOREH_STATE_DIR"]).returncode != 0
