"""Counts the processes that the out-of-memory killer of Linux has ended."""

import contextlib
from pathlib import Path


class OutOfMemoryKills:
    """The count when it was made, to be compared later."""

    def __init__(self) -> None:
        self._before = _count()

    def has_grown(self) -> bool | None:
        """True if the system has killed processes since then; None if it does not count them."""
        now = _count()
        return None if now is None or self._before is None else now > self._before


def _count() -> int | None:
    """The kills in this process's control group and on the whole machine together; None where neither is known."""
    counts = [_entry(path, "oom_kill") for path in (*_groups(), Path("/proc/vmstat"))]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _groups() -> list[Path]:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            number, _, name = line.split(":", 2)
            if number == "0":
                return [Path("/sys/fs/cgroup") / name.lstrip("/") / "memory.events"]
    return []


def _entry(path: Path, name: str) -> int | None:
    """A number of a file of lines "name number"; None if it is not there."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return None
