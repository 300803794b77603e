"""The environment variables that tell a worker its place among the workers.

torchrun and our launcher set them. Libraries that find them set up a distributed training of their own: accelerate does
when a script makes its TrainingArguments, which may be before the line. A worker of our launcher therefore hides them
at `import torch`, before the script can import such a library. In a worker of torchrun they stay until the line, since
its script may be one without the line.
"""

import os
from collections.abc import Mapping

REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The process id of the launcher that started this worker; torchrun does not set it.
LAUNCHER_PID = "MOREH_LAUNCHER"
# In workers that were started again: when the launcher was started, in seconds since the epoch.
RESTARTED_SINCE = "MOREH_RESTARTED_SINCE"
_ALL = (
    *REQUIRED,
    LAUNCHER_PID,
    RESTARTED_SINCE,
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "TORCHELASTIC_USE_AGENT_STORE",
)

_hidden: dict[str, str] = {}


def hide_from_libraries() -> None:
    """Take the variables out of the environment if our launcher started this process; otherwise do nothing."""
    if has_launcher():
        _hidden.update(_removed())


def forget() -> None:
    """Take the variables out of the environment for good, once the world is known."""
    _removed()
    _hidden.clear()


def variables() -> Mapping[str, str]:
    """The environment, with the variables that were hidden."""
    return {**os.environ, **_hidden}


def has_launcher() -> bool:
    """True if our launcher started this process itself."""
    return variables().get(LAUNCHER_PID) == str(os.getppid())


def started_in_world() -> bool:
    """True if our launcher, torchrun or the like started this process as one of several workers."""
    found = variables()
    return "RANK" in found or found.get("WORLD_SIZE", "1") != "1"


def _removed() -> dict[str, str]:
    found = {name: os.environ.pop(name) for name in _ALL if name in os.environ}
    if found:
        os.environ["MOREH_WORKERS"] = "1"  # for the programs that this process starts
    return found
