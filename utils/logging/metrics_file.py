"""Writes metrics.jsonl, one line per step."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from utils.errors import system_word


class MetricsFile:
    """Adds lines to a file.

    A line that cannot be written is no reason to end a training: it is kept, and tried again with the next one. `warn`
    gets a line about the first.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._has_warned = False
        self._kept: list[bytes] = []
        # Unbuffered, so that the unwritten lines are known.
        self._file = path.open("ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step."""
        self._kept.append(json.dumps(metrics, allow_nan=False).encode() + b"\n")
        content = b"".join(self._kept)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)  # without half of a line
            if not self._has_warned:
                self._has_warned = True
                self._warn(
                    f"warning: {self._path} cannot be written: {system_word(error)}; training continues, and its "
                    "lines are tried again"
                )
        else:
            self._size += len(content)
            self._kept.clear()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()
