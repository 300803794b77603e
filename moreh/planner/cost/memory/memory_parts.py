"""The parts of a device's memory at one moment of a step."""

from dataclasses import dataclass, fields

import numpy as np

from moreh.planner.plan.arrays import FloatArray, IntArray


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the peak of a step on a device of each pipeline rank, [n, pipeline] each."""

    parameters: FloatArray
    """Stored weights and their copies in low precision."""
    gradients: FloatArray
    """Gradients of weights."""
    optimizer: FloatArray
    """Optimizer state."""
    activations: FloatArray
    """Activations that are kept or recomputed, and their gradients."""
    logits: FloatArray
    """Logits and the other tensors of the loss."""
    buffers: FloatArray
    """Buffers of collectives, gradients that are converted or added up, and temporaries of the optimizer."""
    fragmentation: FloatArray
    """Memory that the allocator cannot use."""

    def take(self, rows: IntArray) -> "PeakMemory":
        """The plans at these rows."""
        return PeakMemory(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @property
    def total(self) -> FloatArray:
        """The sum, [n, pipeline]."""
        parts = (self.parameters, self.gradients, self.optimizer, self.activations, self.logits, self.buffers)
        return np.asarray(sum(parts) + self.fragmentation)
