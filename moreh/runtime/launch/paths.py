"""Paths of the workers' files in the log directory."""

from pathlib import Path


def log_path(logs: Path, rank: int) -> Path:
    """The log of a worker. Worker 0 has the console; its log has only an error that was kept off the console."""
    return logs / f"rank{rank}.log"


def error_path(logs: Path, rank: int) -> Path:
    """The file in which a worker records the error that ends it."""
    return logs / f"rank{rank}.error.json"


def joined_path(logs: Path) -> Path:
    """The file that a worker makes when it has joined the others."""
    return logs / "joined"


def heartbeat_path(logs: Path, rank: int) -> Path:
    """The file that says where a worker is."""
    return logs / f"rank{rank}.heartbeat"


def stack_path(logs: Path, rank: int) -> Path:
    """The file into which a worker writes its stack, when it is asked to or crashes."""
    return logs / f"rank{rank}.stack"
