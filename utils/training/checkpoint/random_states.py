"""The random states of a script, as saved in a checkpoint."""

import random
from typing import Any

import numpy as np
import torch

from utils.workers import world_size


def random_states() -> dict[str, Any]:
    """The states of the random generators that a script draws from, which are the same on all workers.

    "cuda" has those of the GPUs in torch's order, and nothing where torch has not used a GPU. Each of several workers
    has one GPU, and all of these have the same state.
    """
    _, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    numpy_state = (torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss))
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (*numpy_state, float(cached_gaussian)),
        "cuda": _gpu_states(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the random generators to the result of `random_states`.

    Without GPUs now, or in a checkpoint that was written without them, the states of GPUs stay as they are.
    """
    torch.set_rng_state(states["torch"])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    keys, position, has_gauss, cached_gaussian = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
    _restore_gpu_states(states.get("cuda", []))


def _gpu_states() -> list[torch.Tensor]:
    if not torch.cuda.is_initialized():
        return []
    return [torch.cuda.get_rng_state()] if world_size() > 1 else torch.cuda.get_rng_state_all()


def _restore_gpu_states(states: list[torch.Tensor]) -> None:
    # The accelerator of torch itself: a simulated device draws from the CPU's generator.
    if not states or not torch.accelerator.is_available():
        return
    if len(states) == 1 or world_size() > 1:
        torch.cuda.set_rng_state(states[0])
        return
    for index, state in enumerate(states[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)
