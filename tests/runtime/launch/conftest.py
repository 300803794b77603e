"""Starts scripts in several workers, and checks that nothing is left of them."""

import os
import socket
import subprocess
import sys

import pytest

from tests.helpers.scripts.fork_server import ForkedProcess
from tests.helpers.scripts.launched_scripts import START, WITHOUT_MODELS, processes_of


@pytest.fixture
def environment(state_directory):
    """As in tests/conftest.py, without the measurements of the machine: nothing is planned here."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MOREH_STATE_DIR": str(state_directory)}


@pytest.fixture
def start(environment, tmp_path):
    """Starts source as a user's script, in a session of its own as in a terminal.

    What is not about the start itself may be `forked`: its launcher and its workers are copies of one process.
    """
    started = []

    def start_source(
        source, *arguments, workers=2, command=(sys.executable,), models=False, before="", forked=False, **variables
    ):
        script = tmp_path / "script.py"
        script.write_text(before + ("" if models else WITHOUT_MODELS) + START + source, encoding="utf-8")
        process = (ForkedProcess if forked else subprocess.Popen)(
            [*command, script, *arguments],
            cwd=tmp_path,
            env={**environment, "MOREH_WORKERS": str(workers), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start_source
    left = processes_of(tmp_path)
    for process in [*started, *left]:
        process.kill()
        process.wait()
    assert not left


@pytest.fixture
def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
