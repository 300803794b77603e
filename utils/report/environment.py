"""The environment of a run: versions, processor, GPUs, memory, variables, and the commit."""

import os
import platform
import subprocess
from pathlib import Path

import psutil

from moreh.cli.environment_report import PACKAGES, cpu_model, environment_variables, package_version
from moreh.planner.units import gib
from moreh.system import available_cores
from moreh.version import __version__

# Seconds after which a slow file system is no reason to wait for the name of a commit.
GIT_TIMEOUT_S = 2


def environment_rows() -> dict[str, str]:
    """The hardware and software of the run, by name."""
    rows = {
        "moreh": __version__,
        "Python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
        "commit": commit_of(Path(__file__).parent),
        "system": platform.platform(),
        "CPU": f"{cpu_model()}, {available_cores()} cores available",
        "memory": gib(psutil.virtual_memory().total),
        "GPUs": ", ".join(_gpus()) or "none",
        **environment_variables(os.environ),
    }
    return {name: value for name, value in rows.items() if value}


def commit_of(directory: Path) -> str:
    """The commit of the sources in a directory, with `-dirty` if they were changed; empty without git."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        finished = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return finished.stdout.strip() if finished.returncode == 0 else ""


def _gpus() -> list[str]:
    """The GPUs that torch sees."""
    import torch

    if not torch.accelerator.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
