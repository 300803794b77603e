"""A pool of processes that talk through gloo, started once for all tests.

    results = run_on_workers(function, [arguments, arguments, ...], size=4)

calls `function(*arguments)` on all ranks for one case after the other and returns the ranks' results of each case.
The function is one of a module that can be imported. Arguments and results are pickled.
"""

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Longer than any case takes beside other tests; a collective that waits in vain ends then.
TIMEOUT_S = 120
# What the other ranks get to answer once one has failed: they may wait for it in a collective.
GRACE_S = 2
# Imported once, by the process that the workers and the scripts of tests/helpers/scripts/fork_server.py are copies of.
PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.checkpoint",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "moreh.models.describe.from_source",
    "moreh.runtime.engine.checkpoint_api",
    "moreh.runtime.engine.fast_path",
    "moreh.runtime.engine.hook",
    "moreh.runtime.engine.sharded.install",
    "moreh.runtime.engine.sharded.shard_model",
    # The modules of the tests import it, and with them each worker.
    "pytest",
]

_pools = {}


class WorkerError(AssertionError):
    """A case failed on a rank, or did not end."""


def run_on_workers(function, cases, *, size=2, timeout=TIMEOUT_S):
    """The results of all ranks, [case][rank]. Raises WorkerError with the traceback of the first rank that fails."""
    pool = _pools.get(size)
    if pool is None or not pool.usable:
        pool = _pools[size] = _Pool(size)
    return [pool.run(function, case, timeout) for case in cases]


class _Pool:
    def __init__(self, size):
        # It imports PRELOADED from here.
        from tests.helpers.scripts.fork_server import ForkedProcess

        self.directory = tempfile.mkdtemp(prefix="moreh-workers-")
        self.usable = True
        # One process imports, the others are its copies.
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.processes, self.connections = [], []
        for rank in range(size):
            ours, theirs = multiprocessing.Pipe()
            command = [sys.executable, __file__, str(rank), str(size), self.directory]
            # Ranks of one training share a job. These are none: each has an accelerator of its own.
            state = {"MOREH_STATE_DIR": f"{self.directory}/state-{rank}"}
            process = ForkedProcess(command, cwd=ROOT, env=variables | state, stdin=theirs.fileno())
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)
        atexit.register(self.stop)

    def run(self, function, arguments, timeout):
        for connection in self.connections:
            connection.send((function, arguments, timeout))
        results, failures = {}, []
        waiting = dict(zip(self.connections, range(len(self.connections)), strict=True))
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    succeeded, value = connection.recv()
                except EOFError:
                    succeeded, value = False, "the process ended"
                if succeeded:
                    results[rank] = value
                else:
                    failures.append((rank, value))
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures or waiting:
            self.stop()
            # A rank that lost its peers fails too, later.
            described = [f"rank {rank} of {len(self.connections)}:\n{text}" for rank, text in failures[:1]]
            unanswered = f"no answer from ranks {sorted(waiting.values())} after {timeout} s" if not failures else ""
            raise WorkerError(f"{function.__name__}{arguments!r}\n{''.join(described)}{unanswered}")
        return [results[rank] for rank in range(len(self.connections))]

    def stop(self):
        self.usable = False
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        shutil.rmtree(self.directory, ignore_errors=True)


def _work(rank, size, directory, connection):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory) / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_S))
    while True:
        try:
            function, arguments, timeout = connection.recv()
            # Where a rank hangs is printed before it is killed.
            faulthandler.dump_traceback_later(max(1, timeout - 1))
            answer = True, function(*arguments)
        except EOFError:
            return
        except BaseException:
            answer = False, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        connection.send(answer)


def _main(rank, size, directory):
    """Work for the process whose connection is standard input."""
    connection = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    del sys.path[0]  # the directory of this file, whose modules have names of others
    from moreh.runtime.engine import hook

    # Scripts of the tests compute models of any size; what is tested here is what users have.
    hook.MIN_FLOPS = getattr(hook, "MIN_FLOPS_OF_USERS", hook.MIN_FLOPS)
    _work(int(rank), int(size), directory, connection)


if __name__ == "__main__":
    _main(*sys.argv[1:])
