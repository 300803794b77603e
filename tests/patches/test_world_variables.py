"""The variables of a worker are out of libraries' sight before the script begins, where our launcher started it."""

import os

import pytest
import torch.distributed as dist

from moreh.errors import OptionError
from moreh.patches import world_variables
from moreh.runtime.launch.rendezvous import World, world_from_environment
from moreh.runtime.launch.world import _init_process_group

PLACE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
PLACE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def place(monkeypatch):
    """The environment of a worker, as torchrun makes it."""
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(world_variables.LAUNCHER_PID, raising=False)
    monkeypatch.setenv("MOREH_WORKERS", "4")
    yield monkeypatch
    world_variables.forget()


def test_worker_of_the_launcher_hides_its_place_until_the_line_reads_it(place):
    place.setenv(world_variables.LAUNCHER_PID, str(os.getppid()))
    world_variables.hide_from_libraries()
    assert not {*PLACE, world_variables.LAUNCHER_PID} & os.environ.keys()
    assert os.environ["MOREH_WORKERS"] == "1"
    assert world_variables.started_in_world()
    assert world_variables.has_launcher()
    assert world_from_environment() == World(rank=1, size=4, local_rank=1, local_size=2)
    world_variables.forget()
    assert not world_variables.started_in_world()
    assert not world_variables.has_launcher()


def test_worker_of_torchrun_keeps_its_variables_until_the_line(place):
    world_variables.hide_from_libraries()
    assert os.environ.items() >= PLACE.items()
    assert world_variables.started_in_world()
    assert not world_variables.has_launcher()
    world_variables.forget()
    assert not PLACE.keys() & os.environ.keys()


def test_process_that_a_worker_starts_is_no_worker(place):
    place.setenv(world_variables.LAUNCHER_PID, str(os.getpid()))  # the parent of this one's children
    world_variables.hide_from_libraries()
    assert os.environ.items() >= PLACE.items()


def test_process_group_from_before_the_line_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(OptionError, match=r"before the line, .*: call enable_advanced_parallelization\(\) first, befo"):
        _init_process_group(World(rank=0, size=2, local_rank=0, local_size=2))
