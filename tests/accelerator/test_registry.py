"""Accelerators and jobs as files: the flavors, many writers at once, crashes, and processes that are gone."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from moreh.accelerator import registry as r
from moreh.accelerator.flavors import all_flavors, find_flavor
from moreh.accelerator.state_files import replace_json
from moreh.errors import AcceleratorError, RegistryError

pytestmark = pytest.mark.usefixtures("state_directory")
# A fork of a process with threads, which other tests have started, may wait for ever for a lock that one of them held.
CONTEXT = multiprocessing.get_context("forkserver")
# What each of many processes would import for itself.
CONTEXT.set_forkserver_preload(["pytest", "moreh.accelerator.registry"])


def test_thirteen_flavors_of_the_platform():
    assert [(f.name, f.devices, f.nodes) for f in all_flavors()[:13]] == [
        ("Small.64GB", 1, 1),
        ("Medium.128GB", 2, 1),
        ("Large.256GB", 4, 1),
        ("xLarge.512GB", 8, 1),
        ("1.5xLarge.768GB", 12, 2),
        ("2xLarge.1024GB", 16, 2),
        ("3xLarge.1536GB", 24, 3),
        ("4xLarge.2048GB", 32, 4),
        ("6xLarge.3072GB", 48, 6),
        ("8xLarge.4096GB", 64, 8),
        ("12xLarge.6144GB", 96, 12),
        ("24xLarge.12288GB", 192, 24),
        ("48xLarge.24576GB", 384, 48),
    ]
    assert find_flavor("8").memory_mib == 2_096_640  # the figure that the platform shows for 4xLarge.2048GB


@pytest.mark.parametrize("selection", ["0", "999", "-1", "huge", "", "8.0"])
def test_unknown_flavor_is_refused(selection):
    with pytest.raises(AcceleratorError, match=f"give a number from 1 to {len(all_flavors())} "):
        find_flavor(selection)


def test_accelerators_are_added_switched_and_removed():
    assert [a.index for a in r.read_registry().accelerators] == [0]
    assert r.add_accelerator("3").index == 1
    assert r.add_accelerator("small.64gb").index == 2
    r.select_accelerator(1)
    assert r.switch_model("10").model == "8xLarge.4096GB"
    r.remove_accelerator(1)
    assert r.read_registry().current == 0
    assert r.add_accelerator("1").index == 1  # the lowest free index


def test_sixth_unknown_and_only_accelerator_are_refused():
    for _ in range(4):
        r.add_accelerator("1")
    with pytest.raises(AcceleratorError, match=r"5 accelerators already.*--rm"):
        r.add_accelerator("1")
    with pytest.raises(AcceleratorError, match=r"no accelerator 7: there are 0, 1, 2, 3, 4\."):
        r.remove_accelerator(7)
    with pytest.raises(AcceleratorError, match="no accelerator 9"):
        r.select_accelerator(9)
    for index in (1, 2, 3, 4):
        r.remove_accelerator(index)
    with pytest.raises(AcceleratorError, match="the only one"):
        r.remove_accelerator(0)


def test_token_of_the_first_accelerator_stays():
    assert r.ensure_registry().accelerators[0].token == r.read_registry().accelerators[0].token


def _change_at_random(seed, state_directory):
    os.environ["MOREH_STATE_DIR"] = state_directory
    random.seed(seed)
    for _ in range(6):
        try:
            action = random.randrange(4)
            if action == 0:
                r.add_accelerator(str(random.randint(1, 13)))
            elif action == 1:
                r.remove_accelerator(random.randrange(5))
            elif action == 2:
                r.select_accelerator(random.randrange(5))
            else:
                r.switch_model(str(random.randint(1, 13)))
        except AcceleratorError:
            pass  # refused, which is an answer
        r.read_registry()


def test_fifty_processes_at_once_leave_a_registry_that_reads_correctly(state_directory):
    processes = [CONTEXT.Process(target=_change_at_random, args=(seed, str(state_directory))) for seed in range(50)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 50
    registry = r.read_registry()
    indices = [a.index for a in registry.accelerators]
    assert 1 <= len(indices) <= 5
    assert indices == sorted(set(indices))
    assert registry.current in indices
    assert not list(state_directory.glob("*.tmp"))


def test_no_update_is_lost(state_directory):
    """Fifty processes each take a job id; without a lock some would get the same one."""
    with CONTEXT.Pool(25) as pool:
        ids = pool.map(_take_job_id, [str(state_directory)] * 50)
    assert sorted(ids) == list(range(1, 51))


def _take_job_id(state_directory):
    os.environ["MOREH_STATE_DIR"] = state_directory
    while True:
        try:
            job, _ = r.start_job(psutil.Process(), "test")
        except AcceleratorError:
            time.sleep(0.001)
        else:
            r.end_job(job.id)
            return job.id


def test_writer_killed_in_the_middle_leaves_the_old_content(state_directory):
    r.add_accelerator("2")
    # A writer that dies between writing and replacing, while it holds the lock.
    source = (
        "import os, pathlib; from moreh.accelerator import registry as r\n"
        "pathlib.Path.replace = lambda *a: os.kill(os.getpid(), 9)\n"
        "r.add_accelerator('3')"
    )
    killed = subprocess.run([sys.executable, "-c", source], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(state_directory.glob("*.tmp"))) == 1
    assert [a.model for a in r.read_registry().accelerators] == ["xLarge.512GB", "Medium.128GB"]
    r.add_accelerator("1")  # the lock is free again, and what was left is cleared
    assert len(r.read_registry().accelerators) == 3
    assert not list(state_directory.glob("*.tmp"))


WITH_JOB = (
    '{"current": 0, "next_job_id": 1, "accelerators": [{"index": 0, "model": %s, "token": "a"}], '
    '"jobs": [{"id": 1, "accelerator": 0, "pid": %s, "process_start_time": 0, "command": "c"}]}'
)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"current": 0}',
        '{"current": 3, "next_job_id": 1, "accelerators": [], "jobs": []}',
        "[" * 20000,
        WITH_JOB % ('"Large.256GB"', '"x"'),
        WITH_JOB % ('"Large.256GB"', -5),
        WITH_JOB % (5, 1),
        WITH_JOB % ('"Foo"', 1),
    ],
)
def test_damaged_registry_names_its_file(state_directory, content):
    state_directory.mkdir(exist_ok=True)
    (state_directory / "registry.json").write_text(content, encoding="utf-8")
    with pytest.raises(RegistryError, match=r"registry\.json is damaged .*delete it"):
        r.read_registry()


def test_accelerator_in_use_is_refused_to_others():
    other = psutil.Process(os.getppid())
    r.start_job(other, "python first.py")
    with pytest.raises(AcceleratorError, match=r"in use by job 1 .*python first.py.*moreh-smi device --add"):
        r.start_job(psutil.Process(), "python second.py")
    with pytest.raises(AcceleratorError, match="cannot be switched"):
        r.switch_model("1")
    added = r.add_accelerator("1")
    r.select_accelerator(added.index)
    assert r.start_job(psutil.Process(), "python second.py")[1].index == added.index
    with pytest.raises(AcceleratorError, match="cannot be removed"):
        r.remove_accelerator(0)
    assert r.start_job(psutil.Process(), "python second.py")[0].id == 2  # asked again, it is the same job
    r.end_job(1)
    r.remove_accelerator(0)


def test_process_id_that_is_used_again_is_not_the_job(state_directory):
    job, _ = r.start_job(psutil.Process(), "python train.py")
    assert job.is_running()
    path = state_directory / "registry.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["jobs"][0]["process_start_time"] -= 60  # this process id, but an earlier process
    replace_json(path, content, durable=False)
    assert r.read_registry().jobs == ()


def test_zombie_is_not_running():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    job = r.Job(1, 0, child.pid, psutil.Process(child.pid).create_time(), "child")
    assert job.is_running()
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not job.is_running()
    child.wait()
    assert not job.is_running()


def test_status_file_of_a_dead_job_is_cleared(state_directory):
    job, _ = r.start_job(psutil.Process(), "python train.py")
    replace_json(r.job_status_path(job.id), {}, durable=False)
    orphan = r.job_status_path(999)
    replace_json(orphan, {}, durable=False)
    r.add_accelerator("1")
    assert not orphan.exists()
    assert r.job_status_path(job.id).exists()
    r.end_job(job.id)
    assert not r.job_status_path(job.id).exists()


def test_state_directory_that_cannot_be_used_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("MOREH_STATE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(RegistryError, match=r"cannot be used: Not a directory\. Set MOREH_STATE_DIR"):
        r.add_accelerator("1")
