"""Random numbers of a sharded model, such as those of dropout.

- Data-parallel ranks and pipeline stages draw different numbers (`rank_local_rng`).
- Tensor-parallel ranks draw the same numbers where they compute the same, and different ones where each has heads or a
  part of the sequence of its own (`TPRngState`).
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moreh.runtime.sharding.mesh import Mesh

# 2^64 divided by the golden ratio: multiples of it spread over the 64-bit seeds (Steele et al. 2014, SplitMix).
_SEED_STRIDE = 0x9E3779B97F4A7C15


# For ranks whose model is not known to draw anything; None until the first call of such a model.
_own_generator: torch.Generator | None = None


@contextmanager
def rank_local_rng(mesh: Mesh, *, is_random: bool) -> Iterator[None]:
    """Compute with a generator of this pipeline and data-parallel rank.

    Args:
        mesh: the ranks.
        is_random: True if the model draws random numbers. Then the script's generator advances by one draw on every
            rank, so ranks stay in step even if they draw different amounts, and the script's seed determines the run.
            Otherwise it does not advance, as on one worker.
    """
    seed = int(torch.randint(2**62, (1,), device="cpu", generator=None if is_random else _runtime_generator()))
    index = mesh.rank("pipeline") * mesh.size("data") + mesh.rank("data")
    devices = [mesh.device] if mesh.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed((seed + _SEED_STRIDE * index) % 2**63)
        yield


def _runtime_generator() -> torch.Generator:
    """The runtime's own generator, seeded once by the state of the script's generator, which does not change."""
    global _own_generator
    if _own_generator is None:
        digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).digest()
        _own_generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return _own_generator


class TPRngState:
    """Switches the default generators between the state that tensor-parallel ranks share and this rank's own state.

    A number that is drawn from the shared state, plus the rank, seeds the own state. The shared state advances by that
    one draw, so that the ranks stay in step. A recomputation that starts from the same shared state draws the same
    numbers.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        # The shared states of the CPU's and, if initialized, CUDA's generator while the own states are in use; None
        # while the shared ones are.
        self._before_attention: list[torch.Tensor] | None = None
        self._before_layer: list[torch.Tensor] | None = None

    def enter_attention(self, active: bool) -> None:
        """Before an attention, whose heads are this rank's own: use the own state if `active`."""
        self._before_attention = self._use_own_state() if active else None

    def exit_attention(self) -> None:
        """Before the ranks' outputs of the attention are summed: use the shared state again."""
        _restore(self._before_attention)
        self._before_attention = None

    def enter_layer(self, active: bool) -> None:
        """Before a layer that computes on this rank's part of the sequence: use the own state if `active`."""
        self._before_layer = self._use_own_state() if active else None

    def exit_layer(self) -> None:
        """After the layer: use the shared state again."""
        _restore(self._before_layer)
        self._before_layer = None

    def _use_own_state(self) -> list[torch.Tensor]:
        """Seed the generators for this rank; returns the shared states."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        shared = [torch.get_rng_state()]
        if torch.cuda.is_initialized():
            shared.append(torch.cuda.get_rng_state())
        torch.manual_seed(seed + self._rank)
        return shared


def _restore(states: list[torch.Tensor] | None) -> None:
    if states is None:
        return
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
