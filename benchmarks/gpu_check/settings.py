"""Sizes of the check: those of a GPU, and tiny ones for the dry mode on a CPU."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The child processes learn these from their environment.
DRY, SCRATCH = "GPU_CHECK_DRY", "GPU_CHECK_SCRATCH"


class Skipped(Exception):
    """A case does not apply here; the message says why."""


@dataclass(frozen=True)
class Result:
    """The result of a case."""

    passed: bool
    """True if all checks passed; True for a mere measurement, too."""
    figures: dict[str, Any]
    """Measured values, by name with its unit."""
    reason: str = ""
    """The reason why the case has not passed."""


@dataclass(frozen=True)
class Settings:
    """The sizes of the check."""

    dry: bool
    """True if this is the dry mode on a CPU, whose figures mean nothing."""
    scratch: Path
    """A directory that all parts of one check share."""
    hidden: int
    """The hidden size of the models whose results are compared."""
    rows: int
    """Rows of a batch of these models."""
    length: int
    """Tokens of such a row, padding included."""
    matmul: int
    """The rows and columns of the matrices whose multiplication is timed."""
    warm_up_steps: int
    """Steps of a speed measurement that do not count."""
    max_steps: int
    """Steps of a speed measurement that count, at most."""
    max_seconds: float
    """Seconds of the steps that count, about."""

    @property
    def device(self) -> str:
        """The device that computes."""
        return "cpu" if self.dry else "cuda"


def read_settings() -> Settings:
    """The settings of this process, as its environment says."""
    scratch = Path(os.environ[SCRATCH])
    if os.environ.get(DRY) == "1":
        return Settings(True, scratch, 64, 8, 48, 128, 1, 2, 0.5)
    return Settings(False, scratch, 256, 16, 256, 8192, 5, 40, 4.0)
