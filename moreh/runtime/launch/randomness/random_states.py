"""Copies the random states of rank 0 to all workers."""

import random
import secrets
from typing import Any

import torch
import torch.distributed as dist

from moreh.runtime.launch.randomness.fresh_seeds import agree_on_fresh_seeds

try:
    import numpy as np
except ImportError:  # torch works without it
    np = None  # type: ignore[assignment]


def share_random_states() -> None:
    """Give every worker the states of worker 0's generators: Python's, NumPy's and torch's; collective.

    A script that seeds nothing, or seeds after the line, then draws the same batches on every worker. Generators that
    it makes later without a seed agree as well.
    """
    states: list[Any] = [(_random_states(), secrets.token_bytes()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(states, 0)
    _set_random_states(states[0][0])
    agree_on_fresh_seeds(states[0][1])


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": None if np is None else np.random.get_state(),
        "torch": torch.get_rng_state(),
        # That of a simulated device is torch's own.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    if np is not None and states["numpy"] is not None:
        np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
