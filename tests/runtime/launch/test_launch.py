"""Several workers: the script is started again in each, and together they behave as one program."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moreh import option
from moreh.errors import OptionError
from moreh.runtime.launch.exit_report import error_path, log_path, report
from moreh.runtime.launch.supervisor import Outcome, Signals, WorkerEnd, watch
from moreh.runtime.launch.worker_errors import is_lost_connection

# What the README promises is "within seconds"; what is measured is mostly how long the processes need to start and to end.
SECONDS_TO_BE_GONE = 15
# What the hook does to models takes most of a worker's time to start, and is not under test.
WITHOUT_MODELS = """
import torch, moreh.runtime.engine.hook
moreh.runtime.engine.hook.install_hook = lambda options, variables: None
"""
START = """
import os, signal, sys, time, torch
torch.moreh.option.enable_advanced_parallelization()
import torch.distributed as dist
from moreh.runtime.launch.world import current_world
world = current_world()
def reduce():
    total = torch.tensor([float(world.rank)])
    dist.all_reduce(total)
    return total.item()
assert reduce() == world.size * (world.size - 1) / 2
"""


@pytest.fixture
def environment(state_directory):
    """As in conftest.py, without the measurements of the machine: nothing is planned here."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MOREH_STATE_DIR": str(state_directory)}


@pytest.fixture
def start(environment, tmp_path):
    """Start source as a user's script, in a session of its own as in a terminal; in the end nothing may be left of it."""
    started = []

    def start_source(source, *arguments, workers=2, command=(sys.executable,), models=False, before="", **variables):
        script = tmp_path / "script.py"
        script.write_text(before + ("" if models else WITHOUT_MODELS) + START + source, encoding="utf-8")
        process = subprocess.Popen(
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
    left = running_in(tmp_path)
    for process in [*started, *left]:
        process.kill()
        process.wait()
    assert not left


def running_in(tmp_path):
    """The processes that were started with the registry of this test."""
    found = []
    for process in psutil.process_iter():
        try:
            own = process.pid == os.getpid()
            if not own and process.environ().get("MOREH_STATE_DIR", "").startswith(str(tmp_path)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def finish(process, input=None):
    """The exit code, what a script printed, the errors, and the seconds that it took from now on."""
    begun = time.monotonic()
    said, errors = process.communicate(input, timeout=120)
    own = [line for line in said.splitlines() if not line.startswith("[info]")]
    return process.returncode, own, errors.splitlines(), time.monotonic() - begun


def wait_for_line(process, wanted):
    for line in process.stdout:
        if line.strip() == wanted:
            return
    raise AssertionError(process.stderr.read())


def worker_process(process, rank):
    """The process of a worker, as soon as there is one."""
    for _ in range(600):
        for child in psutil.Process(process.pid).children():
            if child.environ().get("RANK") == str(rank):
                return child
        time.sleep(0.05)
    raise AssertionError("no worker was started")


def test_several_workers_are_one_program(start, tmp_path, state_directory):
    source = """
from moreh.accelerator.registry import read_registry
print("argument", sys.argv[1], flush=True)
print("jobs", [job.pid for job in read_registry().jobs] == [os.getppid()])
print("world", world, sorted({"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & os.environ.keys()))
print("input", input() if world.rank == 0 else sys.stdin.read(), dist.get_backend())
print("to the console", file=sys.stderr)
if world.rank == 0:
    time.sleep(0.5)  # the others end first
"""
    process = start(source, "a b", workers=3, models=True)
    exit_code, said, errors, _ = finish(process, "line\n")
    assert exit_code == 0, errors
    assert said == [
        "argument a b",
        "jobs True",
        "world World(rank=0, size=3, local_rank=0, local_size=3) []",
        "input line gloo",
    ]
    assert errors == ["to the console"]
    assert list((state_directory / "logs").iterdir()) == []


def test_module_and_directory_of_the_start(start, tmp_path):
    """A worker runs the same command line, from the directory in which it was given."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "__main__.py").write_text(
        "import os\n"
        + WITHOUT_MODELS
        + 'os.chdir("elsewhere")\n'
        + START
        + "print(sys.argv[2:], sys.flags.dev_mode, os.getcwd())"
    )
    process = start("", "x", command=(sys.executable, "-X", "dev", "-W", "ignore", "-m", "package"))
    exit_code, said, errors, _ = finish(process)
    assert exit_code == 0, errors
    assert said == [f"['x'] True {tmp_path / 'elsewhere'}"]


FAILURES = """
what, rank = sys.argv[1], int(sys.argv[2])
def fail():
    if what == "raise":
        raise ValueError("bad row 17\\nand more")
    if what == "user error":
        print("error: data.files: no such file", file=sys.stderr)
        sys.exit(2)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise with a collective under way":
        dist.all_reduce(torch.ones(2), async_op=True)
        raise ValueError("bad row 17")
if world.rank == rank or rank < 0:
    fail()
if what == "raise with a collective under way":
    time.sleep(100)
reduce()
print("not reached")
"""


@pytest.mark.parametrize(
    ("what", "rank", "exit_code", "lines"),
    [
        ("raise", 1, 1, [r"error: worker 1 of 2 \(pid \d+\) failed: ValueError: bad row 17", r"error: its log: (.+)"]),
        ("raise", 0, 1, ["Traceback (.*\n)*ValueError: bad row 17", "and more"]),
        ("user error", -1, 2, ["error: data.files: no such file"]),
        (
            "user error",
            1,
            2,
            [r"error: worker 1 .* ended with exit code 2: error: data.files: no .*", r"error: its log: (.+)"],
        ),
        (
            "kill",
            1,
            137,
            [r"error: worker 1 of 2 \(pid \d+\) was killed by SIGKILL, .*memory.*", r"error: its log: (.+)"],
        ),
        ("raise with a collective under way", 0, 1, ["Traceback (.*\n)*ValueError: bad row 17"]),
    ],
)
def test_first_error_is_what_the_user_reads(start, what, rank, exit_code, lines):
    process = start(FAILURES, what, str(rank))
    found_code, said, errors, _ = finish(process)
    match = re.fullmatch("\n".join(lines), "\n".join(errors))
    assert match, errors
    assert (found_code, said) == (exit_code, [])
    if what == "raise" and rank == 1:
        assert Path(match[1]).read_text().endswith("ValueError: bad row 17\nand more\n")


def test_worker_killed_at_its_start(start):
    process = start("time.sleep(100)")
    worker_process(process, 1).kill()
    exit_code, _, errors, seconds = finish(process)
    assert exit_code == 137
    assert re.match(r"error: worker 1 of 2 \(pid \d+\) was killed by SIGKILL", errors[-2])
    assert seconds < SECONDS_TO_BE_GONE


def test_workers_end_with_the_process_that_started_them(start, tmp_path):
    process = start('print("go", flush=True)\nif world.rank: time.sleep(100)\nreduce()')
    wait_for_line(process, "go")
    process.kill()
    process.wait()
    end = time.monotonic() + SECONDS_TO_BE_GONE
    while running_in(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    assert not running_in(tmp_path)


STOPPED = """
counted = []
def stop(number, frame):
    counted.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
reduce()  # all of them are ready
print("go", flush=True)
try:
    while not counted:
        time.sleep(0.05)
except KeyboardInterrupt:
    pass
time.sleep(0.5)
reduce()  # they can still work together
print("saved", counted)
sys.exit(130 if counted[0] == signal.SIGINT else 0)
"""


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signal_lets_all_workers_save(start, number, exit_code):
    process = start(STOPPED)
    wait_for_line(process, "go")
    os.killpg(process.pid, number)
    found_code, said, errors, seconds = finish(process)
    assert (found_code, said, errors) == (exit_code, [f"saved [{number:d}]"], [])
    assert seconds < SECONDS_TO_BE_GONE


def test_interrupt_while_workers_start(start):
    process = start("time.sleep(100)")
    worker_process(process, 1)
    os.killpg(process.pid, signal.SIGINT)
    exit_code, said, errors, seconds = finish(process)
    assert exit_code in (-signal.SIGINT, 1)  # 1 while Python itself starts
    assert (said, [line for line in errors if line.startswith("error")]) == ([], [])
    assert seconds < SECONDS_TO_BE_GONE


LOSES_INTERRUPT = """
import os, signal, time
rank = os.environ.get("RANK")
if rank is not None:
    if rank == "{}":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    open("ready" + rank, "x")
    time.sleep(2)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_interrupt_that_a_starting_worker_loses(start, tmp_path, rank):
    """As Python loses it in a callback of an import: the worker goes on, and waits for the one that has ended."""
    process = start("time.sleep(100)", before=LOSES_INTERRUPT.format(rank))
    while len(list(tmp_path.glob("ready?"))) < 2:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    exit_code, said, errors, seconds = finish(process)
    assert exit_code == -signal.SIGINT
    assert (said, [line for line in errors if line.startswith("error")]) == ([], [])
    assert seconds < SECONDS_TO_BE_GONE


def test_torchrun(start):
    source = """
from moreh.accelerator.registry import read_registry
if world.rank == 0:
    print(world, len(read_registry().jobs), "RANK" in os.environ)
"""
    process = start(source, command=(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"))
    exit_code, said, errors, _ = finish(process)
    assert exit_code == 0, errors
    assert said == ["World(rank=0, size=2, local_rank=0, local_size=2) 1 False"]


def test_torchrun_with_two_nodes_on_one_machine(start, unused_port):
    nodes = [
        start("print(world)", command=(sys.executable, "-m", "torch.distributed.run", *f"--nnodes 2 --node-rank {node} "
              f"--master-addr 127.0.0.1 --master-port {unused_port} --nproc-per-node 1".split()))
        for node in (0, 1)
    ]  # fmt: skip
    for node, process in enumerate(nodes):
        exit_code, said, errors, _ = finish(process)
        assert exit_code == 0, errors
        assert said == [f"World(rank={node}, size=2, local_rank=0, local_size=1)"]


@pytest.fixture
def unused_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_source_from_standard_input_is_refused(start):
    _, _, errors, _ = finish(start("", command=(sys.executable, "-")), START)
    assert errors[-1].startswith("moreh.errors.OptionError: 2 workers in an interactive session or a program read from")


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5", "", "257", "9" * 30])
def test_number_of_workers_is_checked(monkeypatch, value):
    monkeypatch.setenv("MOREH_WORKERS", value)
    with pytest.raises(OptionError, match=f"MOREH_WORKERS='{value}': allowed is a whole number from 1 to 256"):
        option.enable_advanced_parallelization()


def test_incomplete_world_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match=r"WORLD_SIZE=2 without RANK, LOCAL_RANK, .*: start the script with torchrun"):
        option.enable_advanced_parallelization()


def outcome_of(tmp_path, *, stopped_by=None, **workers):
    """The report on workers given as `w2=(exit code, error or None)`, in the order in which they ended."""
    ends = {}
    for time_, (name, (exit_code, error)) in enumerate(workers.items()):
        rank = int(name[1:])
        ends[rank] = WorkerEnd(rank, 100 + rank, exit_code, 10.0 + time_)
        if error is not None:
            lost = "true" if error == "lost" else "false"
            content = f'{{"message": {{"message": "{error}: x", "extraInfo": {{"time": {time_}, "lost_connection": {lost}}}}}}}'
            error_path(tmp_path, rank).write_text(content)
        log_path(tmp_path, rank).write_text("")
    return report(Outcome({rank: 100 + rank for rank in range(4)}, ends, stopped_by), tmp_path)


def test_which_error_came_first(tmp_path):
    # Noticed last, but the cause of the others.
    lines, exit_code = outcome_of(tmp_path, w0=(1, "lost"), w3=(-signal.SIGABRT, None), w1=(1, "ValueError"))
    assert (lines[0], exit_code) == ("worker 1 of 4 (pid 101) failed: ValueError: x", 1)


def test_killed_worker_comes_before_those_that_lost_it(tmp_path):
    lines, exit_code = outcome_of(tmp_path, w0=(1, "lost"), w1=(1, "lost"), w2=(-signal.SIGKILL, None))
    assert lines[0].startswith("worker 2 of 4 (pid 102) was killed by SIGKILL")
    assert exit_code == 137


def test_error_that_worker_0_has_shown_is_not_repeated(tmp_path):
    assert outcome_of(tmp_path, w1=(1, "KeyError"), w0=(1, "KeyError")) == ([], 1)
    assert outcome_of(tmp_path, w1=(5, "KeyError"), w0=(1, "OSError"))[1] == 5


def test_signal_is_no_failure_of_the_workers(tmp_path):
    stopped = {f"w{rank}": (-signal.SIGINT, None) for rank in range(4)}
    assert outcome_of(tmp_path, stopped_by=signal.SIGINT, **stopped) == ([], -signal.SIGINT)
    stopped["w0"] = (1, "lost")
    assert outcome_of(tmp_path, stopped_by=signal.SIGTERM, **stopped) == ([], -signal.SIGTERM)
    lines, _ = outcome_of(tmp_path, stopped_by=signal.SIGTERM, w0=(0, None))
    assert lines == ["after SIGTERM, worker 1, 2, 3 of 4 did not end in time and was killed"]


def test_second_signal_ends_the_waiting(tmp_path):
    worker = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(2, print); print(); time.sleep(60)"],
                              stdout=subprocess.PIPE)  # fmt: skip
    worker.stdout.readline()
    with Signals() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        outcome = watch({0: worker}, {0: tmp_path / "none"}, tmp_path / "none", signals)
    worker.kill()
    worker.wait()
    assert (outcome.ends, outcome.stopped_by, outcome.impatient) == ({}, signal.SIGINT, True)


def test_lost_connections_are_told_from_errors():
    lost = RuntimeError("[.../pair.cc:534] Connection closed by peer [127.0.0.1]:25311")
    assert is_lost_connection(lost)
    for error in (ValueError("connection closed"), OSError("Connection reset by peer"), RuntimeError("shape mismatch")):
        assert not is_lost_connection(error)
    while_cleaning_up = KeyError("key")
    while_cleaning_up.__context__ = lost
    assert is_lost_connection(while_cleaning_up)
