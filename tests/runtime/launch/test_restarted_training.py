"""A training whose worker is stopped for ever ends as the one that nobody disturbed; `make chaos` runs it as well."""

import time

import pytest

from tests.helpers.scripts.disturbed_runs import DisturbedRun, kill_all

STEPS = 20
LINES_UNTIL_STOP = 7


@pytest.mark.slow
def test_training_of_a_stopped_worker_ends_equal(tmp_path):
    quiet = DisturbedRun(tmp_path / "quiet", "tiny", STEPS)
    stopped = DisturbedRun(tmp_path / "stopped", "tiny", STEPS)
    try:
        process = stopped.start("launch.max_restarts=2")
        assert quiet.start().wait() == 0, quiet.console()
        while process.poll() is None and (len(stopped.metrics()) < LINES_UNTIL_STOP or 1 not in stopped.workers()):
            time.sleep(0.05)
        pid = stopped.workers()[1].pid
        stopped.workers()[1].suspend()
        assert process.wait() == 0, stopped.console()
    finally:
        kill_all(quiet)
        kill_all(stopped)
    assert f"Worker 1 of 2 (pid {pid}) is behind: step " in stopped.console()
    assert "restart 1 of 2" in stopped.console()
    assert stopped.differences(quiet) == []
    assert stopped.leftovers() == []
