"""Several workers: the script is started again in each, and together they behave as one program."""

import re
import sys
import time
from pathlib import Path

import pytest

from moreh import option
from moreh.errors import OptionError
from tests.helpers.scripts.launched_scripts import (
    MAX_SECONDS_TO_END,
    START,
    WITHOUT_MODELS,
    finish,
    processes_of,
    wait_for_line,
    wait_for_worker,
)

DRAW_BEFORE_THE_LINE = """
import os, random, numpy, torch
random.seed(os.getpid()), numpy.random.seed(os.getpid()), torch.manual_seed(os.getpid())
"""
# From the line on, the workers draw the same numbers.
DRAW = """
draws = [torch.rand(1).item(), random.random(), numpy.random.rand(), numpy.random.randn()]
draws += [batch.item() for batch in torch.utils.data.DataLoader(range(9), shuffle=True)]
everybody = [None] * world.size
dist.all_gather_object(everybody, (draws, hash("a")))
if world.rank == 0:
    print(world.size, len({str(draws) for draws, _ in everybody}), len({hashed for _, hashed in everybody}))
"""


def test_several_workers_are_one_program(start, tmp_path, state_directory):
    source = """
from moreh.accelerator.registry import read_registry
print("argument", sys.argv[1], flush=True)
print("jobs", [job.pid for job in read_registry().jobs] == [os.getppid()])
print("world", world, sorted({"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & os.environ.keys()))
print("before the line", shows_its_rank, os.environ["MOREH_WORKERS"])
print("input", input() if world.rank == 0 else sys.stdin.read(), dist.get_backend())
print("to the console", file=sys.stderr)
if world.rank == 0:
    time.sleep(0.5)  # the others end first
"""
    process = start(DRAW + source, "a b", workers=3, models=True, before=DRAW_BEFORE_THE_LINE)
    exit_code, printed, errors, _ = finish(process, "line\n")
    assert exit_code == 0, errors
    assert printed == [
        "3 1 1",
        "argument a b",
        "jobs True",
        "world World(rank=0, size=3, local_rank=0, local_size=3) []",
        "before the line False 1",
        "input line gloo",
    ]
    assert errors == ["to the console"]
    assert list((state_directory / "logs").iterdir()) == []


def test_workers_run_the_same_command_line_in_the_directory_of_the_start(start, tmp_path):
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
    exit_code, printed, errors, _ = finish(process)
    assert exit_code == 0, errors
    assert printed == [f"['x'] True {tmp_path / 'elsewhere'}"]


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
    if what == "abort":
        os.abort()
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
            [r"error: worker 1 of 2 \(pid \d+\) was killed by SIGKILL \(.*memory.*", r"error: its log: (.+)"],
        ),
        (
            "abort",
            1,
            134,
            [
                r"error: worker 1 of 2 \(pid \d+\) was killed by SIGABRT \(a library .*\), .*; it stood in fail \(.*",
                r"error: its log: (.+)",
            ],
        ),
        ("raise with a collective under way", 0, 1, ["Traceback (.*\n)*ValueError: bad row 17"]),
    ],
)
def test_first_error_is_what_the_user_reads(start, what, rank, exit_code, lines):
    process = start(FAILURES, what, str(rank), forked=True)
    actual_code, printed, errors, _ = finish(process)
    match = re.fullmatch("\n".join(lines), "\n".join(errors))
    assert match, errors
    assert (actual_code, printed) == (exit_code, [])
    if what == "raise" and rank == 1:
        assert Path(match[1]).read_text().endswith("ValueError: bad row 17\nand more\n")


def test_a_worker_that_is_killed_at_its_start_is_reported(start):
    process = start("time.sleep(100)")
    wait_for_worker(process, 1).kill()
    exit_code, _, errors, seconds = finish(process)
    assert exit_code == 137
    assert re.match(r"error: worker 1 of 2 \(pid \d+\) was killed by SIGKILL", errors[-2])
    assert seconds < MAX_SECONDS_TO_END


def test_workers_end_with_the_process_that_started_them(start, tmp_path):
    process = start('print("go", flush=True)\nif world.rank: time.sleep(100)\nreduce()', forked=True)
    wait_for_line(process, "go")
    assert len(processes_of(tmp_path)) == 3
    process.kill()
    process.wait()
    end = time.monotonic() + MAX_SECONDS_TO_END
    while processes_of(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes_of(tmp_path)


def test_the_world_of_torchrun_is_joined(start):
    source = """
from moreh.accelerator.registry import read_registry
if world.rank == 0:
    print(world, len(read_registry().jobs), "RANK" in os.environ)
"""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    exit_code, printed, errors, _ = finish(start(DRAW + source, command=torchrun, before=DRAW_BEFORE_THE_LINE))
    assert exit_code == 0, errors
    drawn, joined = printed
    assert drawn.split()[:2] == ["2", "1"]
    assert joined == "World(rank=0, size=2, local_rank=0, local_size=2) 1 False"


def test_two_torchruns_on_one_machine_are_one_world(start, unused_port):
    nodes = [
        start("print(world)", command=(sys.executable, "-m", "torch.distributed.run", *f"--nnodes 2 --node-rank {node} "
              f"--master-addr 127.0.0.1 --master-port {unused_port} --nproc-per-node 1".split()))
        for node in (0, 1)
    ]  # fmt: skip
    for node, process in enumerate(nodes):
        exit_code, printed, errors, _ = finish(process)
        assert exit_code == 0, errors
        assert printed == [f"World(rank={node}, size=2, local_rank=0, local_size=1)"]


def test_source_from_standard_input_is_refused(start):
    _, _, errors, _ = finish(start("", command=(sys.executable, "-")), START)
    assert errors[-1].startswith("moreh.errors.OptionError: 2 workers in an interactive session or a program read from")


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5", "", "257", "9" * 30])
def test_number_of_workers_is_checked(monkeypatch, value):
    monkeypatch.setenv("MOREH_WORKERS", value)
    with pytest.raises(OptionError, match=f"MOREH_WORKERS='{value}': expected a whole number from 1 to 256"):
        option.enable_advanced_parallelization()


def test_incomplete_world_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match=r"WORLD_SIZE=2 without RANK, LOCAL_RANK, .*: start the script with torchrun"):
        option.enable_advanced_parallelization()
