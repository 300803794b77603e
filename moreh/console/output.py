"""Writes to standard output and error that ignore write errors, such as those of a full disk."""

import contextlib
import os
import sys


def say(text: str) -> None:
    """Write a line to standard error, if that is possible."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a full disk; a closed or a missing stream
        print(text, file=sys.stderr, flush=True)


def flush_output() -> OSError | None:
    """Flush the buffers of both streams; returns the error of standard output.

    What cannot be written is discarded. Otherwise Python would try it again when it ends, and end with an error.
    """
    failure = None
    for stream in (sys.stderr, sys.stdout):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            failure = error if stream is sys.stdout else failure
            _discard(stream)
        except ValueError:  # it is closed
            pass
    return failure


def _discard(stream: object) -> None:
    """Let a stream write to nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[attr-defined]
        os.close(nowhere)
        stream.flush()  # type: ignore[attr-defined]
