"""The few functions of psutil that the package calls in a training run, from /proc; for a machine without psutil."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STATUS_ZOMBIE = "Z"
_TICKS = os.sysconf("SC_CLK_TCK")


class Error(Exception):
    """As psutil's."""


class NoSuchProcess(Error):
    """As psutil's."""


class AccessDenied(Error):
    """As psutil's."""


class Process:
    """A process by its id; without one, this process."""

    def __init__(self, pid: int | None = None) -> None:
        self.pid = os.getpid() if pid is None else pid
        self._fields()

    def create_time(self) -> float:
        """The start of the process, in seconds since the epoch."""
        line = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        return float(line.split()[1]) + int(self._fields()[19]) / _TICKS

    def status(self) -> str:
        """The letter of its state."""
        return self._fields()[0]

    def cpu_times(self) -> Any:
        """The seconds that it computed."""
        fields = self._fields()
        return SimpleNamespace(user=int(fields[11]) / _TICKS, system=int(fields[12]) / _TICKS)

    def children(self, recursive: bool = False) -> list["Process"]:
        """The processes that it started; only those that it started itself."""
        try:
            ids = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except OSError:
            return []
        return [Process(int(pid)) for pid in ids]

    def parents(self) -> list["Process"]:
        """The processes above it."""
        parent = int(self._fields()[1])
        return [] if parent == 0 else [Process(parent), *Process(parent).parents()]

    def memory_info(self) -> Any:
        """The resident memory of the process, in bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return SimpleNamespace(rss=pages * os.sysconf("SC_PAGE_SIZE"))

    def cmdline(self) -> list[str]:
        """The command line of the process."""
        return Path(f"/proc/{self.pid}/cmdline").read_text().split("\0")[:-1]

    def username(self) -> str:
        """The number of its user."""
        return str(Path(f"/proc/{self.pid}").stat().st_uid)

    def _fields(self) -> list[str]:
        """The fields of its state after the name, from the letter of its state on."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            raise NoSuchProcess(f"no process {self.pid}") from None


def cpu_count(logical: bool = True) -> int | None:
    """The cores of this machine; it does not tell physical ones from others."""
    return os.cpu_count()


def virtual_memory() -> Any:
    """The memory of this machine, in bytes."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {name.rstrip(":"): int(size) * 1024 for name, size, *_ in lines}
    return SimpleNamespace(total=sizes["MemTotal"], available=sizes["MemAvailable"])


def net_if_addrs() -> dict[str, list[Any]]:
    """The loopback interface of Linux."""
    return {"lo": [SimpleNamespace(address="127.0.0.1")]}
