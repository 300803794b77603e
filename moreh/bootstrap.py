"""The first code in a new worker process, before it executes the user's command.

This file is a script that uses neither this package nor site-packages, so that it starts at once:

    python -I -S bootstrap.py PARENT_PID DIRECTORY console|log COMMAND...

The worker dies with its parent, however the parent ends (on Linux; elsewhere `world.py` makes sure of it). With `log`,
stderr goes where stdout goes, and stdin is empty because only one process of a program can read the terminal.
"""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def exec_command(parent_pid: int, directory: str, output: str, command: list[str]) -> None:
    """Turn this process into the command, in a directory (empty: the current one)."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C must not show a traceback of this file
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(1)  # the parent ended before the line above
    if directory:
        os.chdir(directory)
    if output == "log":
        os.dup2(1, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execv(command[0], command)


if __name__ == "__main__":
    exec_command(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
