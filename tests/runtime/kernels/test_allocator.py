"""glibc keeps the memory that a training step has freed."""

import os
import platform
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from moreh.runtime.kernels import allocator

# For each size of tensors in floats, prints the page faults of the last four of twelve rounds that allocate and free
# tensors. Where tensors lie depends on what else is on the heap: they find places that all of them fit in after two to
# four rounds.
COUNT_PAGE_FAULTS = """
import resource
import sys
import torch
from moreh.runtime.kernels.allocator import before_training_step
before_training_step(0)
for size in map(int, sys.argv[1:]):
    for round in range(12):
        if round == 8:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.zeros(size) for _ in range(5 * 2**23 // size)]
        del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides by itself what it keeps")
def test_memory_that_is_kept_is_not_cleared_again():
    sizes = (2**19, 5 * 2**21)
    pages = 4 * 5 * 2**25 // resource.getpagesize()
    untuned = {name: value for name, value in os.environ.items() if name not in allocator._VARIABLES}
    # What glibc returns by default depends on what else lies at the top of the heap. With this variable, which is
    # respected, it returns everything.
    returning = untuned | {"MALLOC_MMAP_THRESHOLD_": "131072"}

    def page_faults(env, *sizes):
        command = [sys.executable, "-c", COUNT_PAGE_FAULTS, *map(str, sizes)]
        return [int(line) for line in subprocess.run(command, env=env, capture_output=True, check=True).stdout.split()]

    assert min(page_faults(returning, *sizes)) > pages / 2
    # In one process, what the first size has left on the heap would change what the second one finds.
    assert max(page_faults(untuned, size)[0] for size in sizes) < pages / 20


@pytest.fixture
def calls(monkeypatch):
    """The calls of the C library, without environment variables of the machine that runs the tests."""
    for variable in allocator._VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    seen = []
    library = SimpleNamespace(mallopt=lambda *args: seen.append(args), malloc_trim=lambda pad: seen.append("trim"))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator, "_state", "unchanged")
    return seen


def test_memory_is_kept_from_the_first_step_on_but_not_between_the_first_two(calls):
    memory = allocator.FreedMemory(keep=True)
    keep = [(-4, 0), (-1, 2**31 - 1)]
    with memory.of_step():
        assert calls == keep
    assert calls[2:] == [(-4, 2**16), (-3, 2**17)]
    with memory.of_step():
        assert calls[4:] == [*keep, "trim"]
    with memory.of_step():
        pass
    assert len(calls) == 7


def test_own_forward_pass_ends_the_state_between_the_first_two_steps(calls):
    memory = allocator.FreedMemory(keep=True)
    with memory.of_step():
        pass
    del calls[:]
    allocator.before_own_forward(with_grad=False)
    assert calls == [(-3, 2**25), (-1, 2**31 - 1), "trim"]
    allocator.before_own_forward(with_grad=True)
    assert len(calls) == 3
    with memory.of_step():
        assert calls[3:] == [(-4, 0), (-1, 2**31 - 1), "trim"]
    allocator.before_own_forward(with_grad=True)
    assert len(calls) == 6


def test_own_forward_pass_keeps_the_heap_where_it_trains(calls):
    allocator.before_own_forward(with_grad=False)
    assert not calls
    allocator.before_own_forward(with_grad=True)
    assert calls == [(-3, 2**25), (-1, 2**31 - 1)]


def test_nothing_is_changed_where_memory_is_not_to_be_kept(calls):
    with allocator.FreedMemory(keep=False).of_step():
        pass
    assert not calls


def test_nothing_is_changed_when_the_user_has_tuned_glibc(calls, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    with allocator.FreedMemory(keep=True).of_step():
        pass
    assert not calls


@pytest.mark.parametrize("library", [SimpleNamespace(), SimpleNamespace(mallopt=None)])
def test_nothing_is_changed_without_glibc(calls, monkeypatch, library):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    with allocator.FreedMemory(keep=True).of_step():
        pass
    assert not calls
