"""Reads the stacks that `faulthandler` has written to a worker's file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')
_THREAD = re.compile(r"^(Current thread|Thread) .*\(most recent call first\):$")
# Parts of paths of code that waits for other workers, and of code that is not the user's.
_COLLECTIVES = ("torch/distributed/",)
_LIBRARIES = ("site-packages/", "dist-packages/", "/lib/python", "<frozen", "moreh/")
# Frames that are looked at; a collective's own are the innermost ones.
_NEAR = 6


@dataclass(frozen=True)
class Frame:
    """A call that has not returned."""

    file: str
    line: int
    function: str

    @property
    def is_library(self) -> bool:
        """True if the frame is not the user's own code."""
        return any(part in self.file for part in _LIBRARIES)

    @property
    def text(self) -> str:
        """The call, for a message."""
        return f"{self.function} ({Path(self.file).name}:{self.line})"


def innermost_frames(path: Path) -> list[Frame]:
    """The stack of the main thread in a file, the innermost frame first; empty if there is none.

    faulthandler writes the threads in the reverse order of their start.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    frames: list[Frame] = []
    for line in lines:
        if _THREAD.match(line):
            frames = []
        elif match := _FRAME.match(line):
            frames.append(Frame(match[1], int(match[2]), match[3]))
    return frames


def waits_for_others(frames: Sequence[Frame]) -> bool:
    """True if a stack is that of a collective, which waits for other workers."""
    return any(part in frame.file for frame in frames[:_NEAR] for part in _COLLECTIVES)
