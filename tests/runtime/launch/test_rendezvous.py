"""Workers that do not find each other say so in one line, and name who is missing."""

import socket
import sys
import threading
import time

import pytest
from torch.distributed import PrefixStore, TCPStore

from moreh.errors import OptionError, PlanError, WorkerError
from moreh.option import _workers_to_start
from moreh.planner.hardware.local_profile import measure
from moreh.runtime.launch import rendezvous as module
from moreh.runtime.launch.rendezvous import World, end_after_others, rendezvous, world_from_environment
from moreh.system import LEAST_PROCESSES, refused_processes

WORLD = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def world(monkeypatch, unused_port):
    """Set the variables of a world of two workers, with changes."""

    def set_variables(**changes):
        for name, value in {**WORLD, "MASTER_PORT": str(unused_port), **changes}.items():
            monkeypatch.setenv(name, value)
        return world_from_environment()

    return set_variables


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": "99999"}, r"MASTER_PORT='99999': expected the number of a port, 1 to 65535"),
        ({"MASTER_PORT": "x"}, r"MASTER_PORT='x': expected"),
        ({"RANK": "5"}, r"RANK=5 of WORLD_SIZE=2, .*: expected ranks from 0, below the number of workers"),
        ({"LOCAL_RANK": "2"}, r"LOCAL_RANK=2 of LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "3"}, r"LOCAL_WORLD_SIZE=3"),
        ({"RANK": "-1"}, r"RANK='-1'.*expected whole numbers"),
    ],
)
def test_wrong_variables_are_one_line(world, changes, message):
    with pytest.raises(OptionError, match=message):
        world(**changes)


def test_peer_that_never_comes_is_named(world, capsys):
    own = world()
    with pytest.raises(
        WorkerError, match=r"rank 1 of 2 workers has not come to MASTER_ADDR=127.0.0.1, MASTER_PORT=\d+ w"
    ):
        rendezvous(own, 2.0)
    assert "warning: rank 1 of 2 workers has not come to" in capsys.readouterr().err


def test_rank_0_that_never_comes_is_named(world):
    with pytest.raises(WorkerError, match=r"rank 0 has not come to MASTER_ADDR=127.0.0.1, MASTER_PORT=\d+ within 1 s"):
        rendezvous(world(RANK="1", LOCAL_RANK="1"), 1.0)


def test_port_in_use_and_unknown_host_are_refused(world, unused_port):
    own = world()
    with socket.create_server(("0.0.0.0", unused_port)), pytest.raises(OptionError, match="rank 0 cannot listen there"):
        rendezvous(own, 1.0)
    with pytest.raises(OptionError, match="there is no such host"):
        rendezvous(world(MASTER_ADDR="no-such-host.invalid"), 1.0)


def test_a_world_of_one_meets_at_once(world):
    own = world(WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    assert own == World(0, 1, 0, 1)
    assert rendezvous(own, 5.0).check(["moreh/here/0"])


def test_rank_0_lives_as_long_as_workers_that_use_its_store(world):
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    clients = [server, TCPStore("localhost", server.port, wait_for_workers=False)]
    ended = []
    threads = [
        threading.Thread(target=lambda: [end_after_others(World(0, 2, 0, 2), clients[0]), ended.append(0)]),
        threading.Thread(
            target=lambda: [time.sleep(0.5), ended.append(1), end_after_others(World(1, 2, 1, 2), clients[1])]
        ),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert ended == [1, 0]


@pytest.mark.parametrize("reason", ["the agent has the store", "rank 0 has failed", "rank 1 was killed"])
def test_rank_0_does_not_wait_in_vain(monkeypatch, reason):
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    if reason == "the agent has the store":
        store = PrefixStore("worker", store)
    elif reason == "rank 0 has failed":
        monkeypatch.setattr(sys, "last_type", ValueError, raising=False)
    else:
        monkeypatch.setattr(module, "ENDING_S", 0.1)
    waiting = threading.Thread(target=end_after_others, args=(World(0, 2, 0, 2), store), daemon=True)
    waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()


def test_more_processes_than_cores_or_memory_allow_are_refused(monkeypatch):
    monkeypatch.setattr("moreh.system.available_cores", lambda: 2)
    monkeypatch.setattr("moreh.system.available_memory_bytes", lambda: 10 * 2**30)
    assert refused_processes(LEAST_PROCESSES) is None
    assert "at most 8 on this machine, which has 2 CPU core(s)" in refused_processes(9)
    monkeypatch.setattr("moreh.system.available_cores", lambda: 64)
    assert refused_processes(34) is None
    assert "at most 34 now: 10.0 GiB of memory are free" in refused_processes(35)


def test_workers_and_measuring_processes_are_limited(monkeypatch):
    monkeypatch.setattr("moreh.system.available_cores", lambda: 2)
    monkeypatch.setenv("MOREH_WORKERS", "256")
    with pytest.raises(OptionError, match=r"MOREH_WORKERS=256 \(accelerator.workers\): expected at most 8 on this"):
        _workers_to_start()
    with pytest.raises(PlanError, match=r"workers=999: each is measured as a process; expected at most 8 on"):
        measure(999)
