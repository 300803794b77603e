"""Memory that a step has freed."""

import os
import platform
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from moreh.runtime.kernels import allocator

# Pieces that are made and freed again and again, of so many floats each; the page faults of the last four of twelve rounds.
# Where pieces lie depends on what else is on the heap: they find places that all of them fit in after two to four rounds.
FAULTS = """
import resource
import sys
import torch
from moreh.runtime.kernels.allocator import before_training_step
before_training_step(0)
size = int(sys.argv[1])
for turn in range(12):
    if turn == 8:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.zeros(size) for _ in range(5 * 2**23 // size)]
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides by itself what it keeps")
@pytest.mark.parametrize("size", [2**19, 5 * 2**21])
def test_kept_memory_is_not_cleared_again(size):
    pages = 4 * 5 * 2**25 // resource.getpagesize()
    own = {name: value for name, value in os.environ.items() if name not in allocator._VARIABLES}
    # What glibc gives back by itself depends on what else lies at the top; with this setting, which is respected, everything.
    given_back = own | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", FAULTS, str(size)]
    faults = [
        int(subprocess.run(command, env=env, capture_output=True, check=True).stdout) for env in (given_back, own)
    ]
    assert faults[0] > pages / 2
    assert faults[1] < pages / 20


@pytest.fixture
def calls(monkeypatch):
    """The calls of the C library, and no variables that belong to the machine."""
    for variable in allocator._VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    seen = []
    library = SimpleNamespace(mallopt=lambda *given: seen.append(given), malloc_trim=lambda pad: seen.append("trim"))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    return seen


def test_what_happens_when(calls):
    allocator.before_training_step(0)
    keep = [(-4, 0), (-1, 2**31 - 1)]
    assert calls == keep
    allocator.after_training_step(0)
    assert calls[2:] == [(-4, 2**16), (-3, 2**17)]
    allocator.before_training_step(1)
    assert calls[4:] == [*keep, "trim"]
    allocator.after_training_step(1)
    allocator.before_training_step(2)
    assert len(calls) == 7


def test_settings_of_the_user_are_left(calls, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    allocator.before_training_step(0)
    allocator.after_training_step(0)
    assert not calls


@pytest.mark.parametrize("library", [SimpleNamespace(), SimpleNamespace(mallopt=None)])
def test_without_glibc(calls, monkeypatch, library):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    allocator.before_training_step(0)
    allocator.after_training_step(0)
    assert not calls
