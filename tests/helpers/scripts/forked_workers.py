"""Workers that a forked script starts, without the seconds in which each of them imports torch.

A launcher starts each worker as a new Python. In a script of tests/helpers/scripts/fork_server.py, it asks a copy of
this process instead, which was made before the script began and forks. What comes between ends at once, so that the
worker's parent is the launcher, which reaps its descendants: signals, ids, exit codes and sessions are those of a
process that it started. The seed of Python's hashes and options of the interpreter are those of the server.
"""

import atexit
import contextlib
import ctypes
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h
MAX_REQUEST_BYTES = 1 << 17
PID_BYTES = 4
START_OF_BOOTSTRAP = ["-I", "-S"]


def workers_are_forked():
    """Makes the launcher of this process fork its workers. In each of them, it returns the worker's command line.

    In this process it returns None.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    launcher = os.getpid()
    if os.fork() == 0:
        ours.close()
        return _become_worker(*_serve(theirs, launcher))
    theirs.close()
    _Worker.connection = ours
    subprocess_handler.Popen = _Worker
    return None


class _Worker(subprocess.Popen):
    """`subprocess.Popen([sys.executable, "-I", "-S", bootstrap, ...], ...)`, forked."""

    connection: socket.socket

    def _execute_child(self, args, *settings):
        env, (stdin, _, _, stdout, _, stderr) = settings[5], settings[9:15]
        assert list(args[1:3]) == START_OF_BOOTSTRAP
        request = json.dumps({"command": args[4:], "env": env}).encode()
        assert len(request) < MAX_REQUEST_BYTES
        files = [number if given == -1 else given for number, given in enumerate((stdin, stdout, stderr))]
        socket.send_fds(self.connection, [request], files)
        self.pid = int.from_bytes(self.connection.recv(PID_BYTES), "big")
        self._child_created = True


def _serve(connection, launcher):
    """Fork for each request; returns in the process that becomes a worker, and ends with the launcher."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.chdir("/")
    # Of the signals to the whole group, the launcher decides what they mean.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    while True:
        request, files, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
        if not request:
            os._exit(0)
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)
            while os.getppid() != launcher:
                if not Path(f"/proc/{launcher}").exists():
                    os._exit(1)
                time.sleep(0.001)
            connection.send(os.getpid().to_bytes(PID_BYTES, "big"))
            connection.close()
            return json.loads(request), files
        os.waitpid(between, 0)
        for file in files:
            os.close(file)


def _become_worker(request, files):
    """Do what the new process does until it is the user's command; returns that command line."""
    from moreh import bootstrap

    renew_thread_pool()
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    commands, execv = [], os.execv
    os.execv = lambda path, command: commands.append(command)
    parent, directory, output, *command = request["command"]
    os.chdir(Path(f"/proc/{os.getppid()}/cwd"))
    bootstrap.exec_command(int(parent), directory, output, command)
    os.execv = execv
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a new Python does
    return commands[0][1:]


def renew_thread_pool():
    """Make torch's thread pool anew in a forked process, while it has one thread.

    The first use of the pool after a fork replaces it, and a second thread of that moment fails with "Invalid thread
    pool!" (`caffe2::pthreadpool`): transformers' loading threads, say.
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())


def run_and_end(script):
    """Run a script and end with its exit code, as Python does but for the objects that it leaves.

    Python would take apart all that the server has imported, which takes longer than most scripts, and a launcher waits
    for a second once a worker has lost the connection to this one.
    """
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:  # ends with the signal
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)
    sys.exit(code)  # Python reports output that cannot be written
