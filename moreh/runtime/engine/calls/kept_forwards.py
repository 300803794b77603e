"""Forward passes that the second pass of a custom loss need not repeat.

While the script computes its loss, each rank keeps the activations of as many micro-batches as its first stage has in
flight in a training step under 1F1B. Under the other schedules it has no fewer.

The script's loss then needs its memory beside the activations, which a training step frees before another forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, WeakSet, ref

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moreh.runtime.engine.parallel_model import ParallelModel
from moreh.runtime.kernels.allocator import free_bytes
from moreh.runtime.pipeline.kept_passes import KeptPasses

# A distillation has the logits, two probabilities, a product and the gradient in float32.
_BYTES_OF_LOSS = 5 * 4


_live: WeakSet["KeptForwards"] = WeakSet()
_hook: Any = None


class KeptForwards:
    """The forward passes of a rank's first stage that are kept, at most those of one call."""

    def __init__(self, model: ParallelModel) -> None:
        self._model, self._stage = model, model.stages[0]
        self._count = model.plan.pipeline - model.mesh.rank("pipeline")
        self._latest: ReferenceType[KeptPasses] | None = None

    @contextmanager
    def of_first_pass(self) -> Iterator[KeptPasses]:
        """Keep the forward passes of the first micro-batches. Those of an earlier call are dropped."""
        self.drop()
        kept = KeptPasses(self._count)
        self._latest = ref(kept)
        _drop_at_steps(self)
        self._stage.kept = kept
        try:
            yield kept
        finally:
            self._stage.kept = KeptPasses()

    @contextmanager
    def in_second_pass(self, kept: KeptPasses) -> Iterator[None]:
        """Let the stage use the forward passes instead of computing them again."""
        self._stage.kept = kept.take()
        try:
            yield
        finally:
            self._stage.kept = KeptPasses()

    def drop_if_memory_is_short(self, logits: torch.Tensor) -> None:
        """Drop the forward passes if a rank may lack memory for a loss that the script makes of logits; collective."""
        model, needed_bytes = self._model, _BYTES_OF_LOSS * logits.numel()
        if logits.device.type == "cpu":
            needed_bytes *= model.plan.devices  # the workers share the memory
        is_short = torch.tensor(float(needed_bytes > free_bytes(logits.device)), device=logits.device)
        model.mesh.all_reduce(is_short)
        if is_short:
            self.drop()

    def drop_if_changed(self, changing: set[int]) -> None:
        """Drop the forward passes if parameters with these ids change; on every rank, since all have all parameters."""
        if not changing.isdisjoint(map(id, self._model.user_params.values())):
            self.drop()

    def drop(self) -> None:
        """Free the activations. The second pass of their call computes them again."""
        latest = None if self._latest is None else self._latest()
        if latest is not None:
            latest.take()


def _drop_at_steps(forwards: KeptForwards) -> None:
    """Let forward passes be dropped at an optimizer's step, after which their graphs are of other weights."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_optimizer_step)
    _live.add(forwards)


def _before_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _live:
        changing = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for forwards in list(_live):
            forwards.drop_if_changed(changing)
