"""Runs the examples in docstrings of held-out functions with the bodies that a model has written."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from utils.workers import max_over_ranks, rank

# A busy machine gives a process little of the CPU time that `example_process.py` allows.
_TIMEOUT_S = 120
_PROCESS = Path(__file__).with_name("example_process.py")
_SIGN = ">>> "


def functions_with_examples(functions: Iterable[tuple[str, str]], count: int) -> list[int]:
    """The indices of the first `count` functions whose examples show something; collective over the workers.

    Args:
        functions: signature with docstring, and body of each.
    """
    chosen: list[int] = []
    for index, (signature, body) in enumerate(functions):
        if len(chosen) == count:
            break
        if _SIGN in signature and max_over_ranks(int(rank() == 0 and examples_need_body(signature, body))):
            chosen.append(index)
    return chosen


def examples_need_body(signature: str, body: str) -> bool:
    """True if the examples in a docstring pass with the function's own body, and fail without it."""
    first = next((line for line in body.splitlines() if line.strip()), "")
    nothing = first[: len(first) - len(first.lstrip())] + "raise NotImplementedError\n"
    return examples_pass(signature + body) and not examples_pass(signature + nothing)


def examples_pass(source: str) -> bool:
    """True if all docstring examples of a source pass, in a process with limits on time, memory and files.

    The limits stop mistakes. They do not keep the code from files and networks that this process may use.
    """
    word = secrets.token_hex()
    # The process may write to files only, since they have a limit.
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", _PROCESS],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(f"{word}\n{source}".encode("utf-8", "replace"), _TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # the processes that it may have started, too
            process.wait()
        output.seek(0)
        return output.read().decode("utf-8", "replace").splitlines()[-1:] == [word]
