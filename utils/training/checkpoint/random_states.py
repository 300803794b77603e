"""The states of the random generators that a script draws from, as a checkpoint keeps them."""

import random
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """The states of the random generators that a script draws from, which are the same on all workers."""
    _, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    numpy_state = (torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss))
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (*numpy_state, float(cached_gaussian)),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the random generators to what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    keys, position, has_gauss, cached_gaussian = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
