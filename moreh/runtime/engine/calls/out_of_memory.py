"""Repeats a step that runs out of GPU memory, in smaller micro-batches.

A plan's memory is a prediction, and another process may have taken some of the GPU. The loss and the gradients do not
depend on how a batch is cut.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from moreh.errors import MorehError
from moreh.log import logger
from moreh.runtime.batch.batch_cutter import BatchCutter
from moreh.runtime.batch.model_inputs import ModelInputs
from moreh.runtime.sharding.mesh import Mesh

Computed = TypeVar("Computed")
# Rows and tokens of a micro-batch, and the size of its hidden states.
Shape = tuple[int, int, int]


class MicroBatchLimit:
    """The most tokens that micro-batches of one model may have, as far as the memory has shown."""

    def __init__(self) -> None:
        self._tokens: int | None = None
        self._largest = 0

    def cut(
        self, cutter: BatchCutter, inputs: ModelInputs, num_micro_batches: int, max_tokens: int | None
    ) -> list[ModelInputs]:
        """The micro-batches of `BatchCutter.cut`, of at most `max_tokens` tokens and of no more than the limit."""
        limits = [tokens for tokens in (max_tokens, self._tokens) if tokens is not None]
        micro_batches = cutter.cut(inputs, num_micro_batches, min(limits, default=None))
        self._largest = max(each.batch_size * each.sequence_length for each in micro_batches)
        return micro_batches

    def compute(self, cut: Callable[[], Shape], step: Callable[[Shape], Computed], mesh: Mesh) -> Computed:
        """The result of `step` for a batch; after an out-of-memory error, the batch is cut and computed again.

        Several workers compute it once: the others would wait for the one whose memory is full.

        Args:
            cut: Cuts the batch with `cut` of this object; returns what `step` is called with.
            step: Computes the micro-batches.
            mesh: The ranks.

        Raises:
            torch.OutOfMemoryError: it does not fit in smaller micro-batches either, or it is simulated.
        """
        states = _random_states(mesh.device)
        try:
            return step(cut())
        except torch.OutOfMemoryError as error:
            if mesh.device_mesh is not None or isinstance(error, MorehError) or not self._halve(cut):
                raise
        # Only here, where the error and the tensors of its frames are gone.
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        _set_random_states(states, mesh.device)
        return step(cut())

    def _halve(self, cut: Callable[[], Shape]) -> bool:
        """Halve the limit; returns whether micro-batches become smaller by it."""
        earlier, before = self._tokens, self._largest
        self._tokens = max(1, before // 2)
        cut()
        if self._largest >= before:
            self._tokens = earlier
            return False
        logger.warning(
            "Out of memory: this step is computed again in micro-batches of at most %s tokens instead of %s, and so "
            "are later ones. The loss stays the same.",
            f"{self._largest:,}",
            f"{before:,}",
        )
        return True


def _random_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_states(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)
