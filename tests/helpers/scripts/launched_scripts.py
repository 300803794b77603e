"""Sources of scripts that run in several workers, and what the tests do with their processes."""

import os
import time

import psutil

# The docs promise "within seconds". What is measured is mostly how long the processes need to start and to end.
MAX_SECONDS_TO_END = 15
# Preparing to shard models takes most of a worker's time to start, and is not under test.
WITHOUT_MODELS = """
import sys, torch, types
sys.modules["moreh.runtime.engine.hook"] = types.SimpleNamespace(install_hook=lambda options, variables: None)
"""
START = """
import os, signal, sys, time, torch
shows_its_rank = "RANK" in os.environ
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


def processes_of(directory):
    """The processes that were started with a registry below a directory, or that are in it, as copies are."""
    processes = []
    for process in psutil.process_iter():
        try:
            places = process.environ().get("MOREH_STATE_DIR", ""), process.cwd()
            if process.pid != os.getpid() and any(place.startswith(str(directory)) for place in places):
                processes.append(process)
        except psutil.Error:
            continue
    return processes


def finish(process, input=None):
    """The exit code, what the script printed, stderr's lines, and the seconds until the end."""
    begun = time.monotonic()
    output, errors = process.communicate(input, timeout=300)
    printed = [line for line in output.splitlines() if not line.startswith("[info]")]
    return process.returncode, printed, errors.splitlines(), time.monotonic() - begun


def wait_for_line(process, expected):
    for line in process.stdout:
        if line.strip() == expected:
            return
    raise AssertionError(process.stderr.read())


def wait_for_worker(process, rank):
    """The process of a worker, as soon as there is one."""
    for _ in range(600):
        for child in psutil.Process(process.pid).children():
            if child.environ().get("RANK") == str(rank):
                return child
        time.sleep(0.05)
    raise AssertionError("no worker was started")
