"""A process that has imported torch and transformers, and becomes scripts by forking: a start takes no seconds.

    finished = run_forked([script, "argument"], cwd=directory, env=variables)
    finished = run_forked_workers([script], 2, cwd=directory, env=variables)
    process = ForkedProcess([sys.executable, script], cwd=directory, env=variables, stdout=subprocess.PIPE)

The first is `subprocess.run([sys.executable, script, "argument"], ...)` with its output captured, the second the same
on each rank of two workers, as torchrun starts them, the third `subprocess.Popen` with the same arguments. Workers that
a script starts itself are forked too (forked_workers.py). What happens while Python starts and imports torch and
transformers cannot be tested with it. The server starts with the first script and ends with the process of the tests.
"""

import gc
import importlib
import io
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

# Elsewhere than on Linux, scripts are started as usual.
AVAILABLE = hasattr(os, "pidfd_open")
TIMEOUT_S = 300
# Once a worker has failed: the others may wait for it in a collective.
GRACE_S = 10
# What scripts import besides what the pools of workers do.
LIBRARIES_OF_SCRIPTS = ["datasets", "transformers.tokenization_utils_tokenizers", "matplotlib.backends.backend_agg"]
LIBRARIES_OF_SCRIPTS += ["matplotlib.figure", "utils.cli", "utils.data.batches", "utils.training.model"]
MAX_REQUEST_BYTES = 1 << 17
PID_BYTES = 4

_server = None
_starting = threading.Lock()


def run_forked(command, *, cwd, env, input=None, timeout=TIMEOUT_S):
    """Run a script and its arguments to their end; the completed process with its output as text.

    `input` is what it reads from standard input, as text or bytes.
    """
    return start_forked(command, cwd=cwd, env=env, input=input).finish(timeout)


def run_forked_workers(command, workers, *, cwd, env, timeout=TIMEOUT_S):
    """The completed processes of all ranks of a script on some workers; one worker is no world of several."""
    if workers == 1:
        return [run_forked(command, cwd=cwd, env=env, timeout=timeout)]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [{**env, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(workers)]
    scripts = [start_forked(command, cwd=cwd, env=environment) for environment in environments]
    finished = []
    for script in scripts:
        failed = any(process.returncode for process in finished)
        finished.append(script.finish(GRACE_S if failed else timeout))
    return finished


def start_forked(command, *, cwd, env, input=None):
    """Start a script: a `_Script`, with the process's `pid`."""
    script = _ForkedScript if AVAILABLE else _Script
    return script(
        [str(part) for part in command], cwd, env, input if isinstance(input, bytes) else (input or "").encode()
    )


class _Script:
    """A script in a Python of its own."""

    def __init__(self, command, cwd, env, input):
        self.command = command
        self.files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115  (closed by _finished)
        self.files[0].write(input)
        self.files[0].seek(0)
        self._begin(str(cwd), env)

    def _begin(self, cwd, env):
        stdin, stdout, stderr = self.files
        command = [sys.executable, *self.command]
        self.process = subprocess.Popen(command, cwd=cwd, env=env, stdin=stdin, stdout=stdout, stderr=stderr)
        self.pid = self.process.pid

    def output(self):
        """The script's standard output until now."""
        number = self.files[1].fileno()
        return os.pread(number, os.fstat(number).st_size, 0).decode()

    def finish(self, timeout):
        """Wait for the script, which is killed when its time is over: its exit code is then -SIGKILL."""
        try:
            return self._finished(self.process.wait(timeout))
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self._finished(self.process.wait())

    def _finished(self, exit_code):
        outputs = []
        for file in self.files:
            with file:
                file.seek(0)
                outputs.append(file.read())
        return subprocess.CompletedProcess(self.command, exit_code, *(output.decode() for output in outputs[1:]))


class _ForkedScript(_Script):
    """A script in a copy of the server."""

    def _begin(self, cwd, env):
        files = [file.fileno() for file in self.files]
        self.connection, self.pid = _begin({"command": self.command, "cwd": cwd, "env": env, "session": False}, files)

    def finish(self, timeout):
        with self.connection:
            self.connection.settimeout(timeout)
            try:
                answer = self.connection.recv(16)
            except TimeoutError:
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(None)
                answer = self.connection.recv(16)
        return self._finished(int(answer))


class _ForkedProcess(subprocess.Popen):
    """`subprocess.Popen([sys.executable, script, ...], ...)` in a copy of the server."""

    def _execute_child(self, args, *settings):
        cwd, env, pipes, session = settings[4], settings[5], settings[9:15], settings[20]
        (stdin, _, _, stdout, _, stderr) = pipes
        command = {"command": [str(part) for part in args[1:]], "cwd": str(cwd or Path.cwd()), "env": env}
        files = [number if given == -1 else given for number, given in enumerate((stdin, stdout, stderr))]
        self.connection, self.pid = _begin({**command, "session": session}, files)
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _internal_poll(self, *_, **__):
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self._wait(None)
        return self.returncode

    def _wait(self, timeout):
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = int(self.connection.recv(16))
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self.connection.close()
        return self.returncode


ForkedProcess = _ForkedProcess if AVAILABLE else subprocess.Popen


def _begin(request, files):
    """The connection to a script that begins, from which its exit code comes, and its pid."""
    connection, theirs = socket.socketpair()
    content = json.dumps(request).encode()
    assert len(content) < MAX_REQUEST_BYTES
    with theirs:
        socket.send_fds(_connect(), [content], [*files, theirs.fileno()])
    connection.settimeout(TIMEOUT_S)
    return connection, int.from_bytes(connection.recv(PID_BYTES), "big")


def _connect():
    """The connection to the server, which is started if there is none."""
    global _server
    with _starting:
        if _server is None:
            _server, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
            with theirs:
                subprocess.Popen(
                    [sys.executable, __file__, str(theirs.fileno())],
                    # The registry is that of each script; none is that of this process.
                    env={**os.environ, "OMP_NUM_THREADS": "1", "MOREH_STATE_DIR": os.devnull},
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
    return _server


def _serve(connection):
    """Fork for each request; returns in the process that becomes a script, and ends the server with its last client."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait
    while True:
        request, files, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 4)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            script = os.fork()
            if script == 0:
                return json.loads(request), files
            _wait(script, socket.socket(fileno=files[3]), files[:3])
        for file in files:
            os.close(file)


def _wait(script, client, files):
    """Answer with the pid and later the exit code of a script, which is killed if the client goes."""
    for file in files:
        os.close(file)
    client.sendall(script.to_bytes(PID_BYTES, "big"))
    end = os.pidfd_open(script)
    if end not in select.select([end, client], [], [])[0]:
        os.kill(script, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])
    try:
        client.sendall(str(code).encode())
    finally:
        os._exit(0)


def _become(request, files):
    """Make this process what `python SCRIPT ARGUMENTS` is when the script begins, and run the script."""
    import numpy

    from moreh import option
    from tests.helpers.scripts.forked_workers import renew_thread_pool, run_and_end, workers_are_forked

    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    _renew_streams()
    os.chdir(request["cwd"])
    option._START_DIRECTORY = request["cwd"]  # that of the import, where the workers start
    os.environ.clear()
    os.environ.update(request["env"])
    command = request["command"]
    if request["session"]:
        os.setsid()
    if _starts_workers(command, request["env"]):
        command = workers_are_forked() or command
    renew_thread_pool()
    numpy.random.seed()
    sys.argv, sys.orig_argv = command, [sys.executable, *command]
    more = request["env"].get("PYTHONPATH", "")
    sys.path[:1] = [str(Path(command[0]).resolve().parent), *filter(None, more.split(os.pathsep))]
    run_and_end(command[0])


def _renew_streams():
    """Make standard output and error anew where they are pipes: Python asks once whether a stream can be sought."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        try:
            os.lseek(number, 0, os.SEEK_CUR)
        except OSError:
            buffer = open(number, "wb", closefd=False)  # noqa: SIM115  (a number)
            is_line_buffered = number == 2 or os.isatty(number)
            new = io.TextIOWrapper(buffer, old.encoding, old.errors, "\n", is_line_buffered)
            setattr(sys, name, new)
            for handler in (reference() for reference in logging._handlerList):
                if getattr(handler, "stream", None) is old:
                    handler.stream = new


def _starts_workers(command, env):
    given = any("workers=" in argument or "max_restarts=" in argument for argument in command)
    return given or env.get("MOREH_WORKERS", "1") != "1" or "MOREH_MAX_RESTARTS" in env


def _import_libraries():
    sys.path.insert(1, str(Path(__file__).parents[3]))
    from tests.helpers.workers import PRELOADED

    for name in (*PRELOADED, *LIBRARIES_OF_SCRIPTS, "tests.helpers.scripts.forked_workers"):
        importlib.import_module(name)
    import torch

    from moreh.runtime.engine import hook

    del sys.path[1]
    torch.set_num_threads(1)
    # The tiny models of the tests' scripts would never be computed as those of users are.
    hook.MIN_FLOPS_OF_USERS, hook.MIN_FLOPS = hook.MIN_FLOPS, 0


if __name__ == "__main__":
    _import_libraries()
    gc.freeze()
    _become(*_serve(socket.socket(fileno=int(sys.argv[1]))))
