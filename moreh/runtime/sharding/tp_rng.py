"""Random numbers of a tensor-parallel rank's own, for what it drops of its own activations.

All tensor-parallel ranks share the state of the default generators. Where they compute the same, they drop the same; where
each has heads or a part of the sequence of its own, each draws from a generator seeded from the shared one and its rank. The
shared state goes on by that one draw, so that ranks stay in step and a recomputation that starts from the same shared state
draws the same numbers.
"""

import torch


class TPRngState:
    """Switches the default generators between the shared state and one of this rank's own."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._heads: list[torch.Tensor] | None = None
        self._layer: list[torch.Tensor] | None = None

    def enter_attention(self, active: bool) -> None:
        """From the input of an attention on: its heads are this rank's own."""
        self._heads = self._switch() if active else None

    def exit_attention(self) -> None:
        """Before its results are summed."""
        _restore(self._heads)
        self._heads = None

    def enter_layer(self, active: bool) -> None:
        """From the input of a layer on that computes with this rank's part of the sequence."""
        self._layer = self._switch() if active else None

    def exit_layer(self) -> None:
        """Behind the layer."""
        _restore(self._layer)
        self._layer = None

    def _switch(self) -> list[torch.Tensor]:
        """Seed the generators for this rank; returns the shared state."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        shared = [torch.get_rng_state()]
        if torch.cuda.is_initialized():
            shared.append(torch.cuda.get_rng_state())
        torch.manual_seed(seed + self._rank)
        return shared


def _restore(shared: list[torch.Tensor] | None) -> None:
    if shared is None:
        return
    torch.set_rng_state(shared[0])
    if len(shared) > 1:
        torch.cuda.set_rng_state(shared[1])
