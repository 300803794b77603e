"""Forward passes of a stage that are computed before its training step."""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(eq=False)
class KeptPasses:
    """A stage's forward passes of some micro-batches, with their graphs, which are computed once and used once."""

    count: int = 0
    """While this is not 0, the stage adds its forward passes of this many first micro-batches."""
    received: dict[int, torch.Tensor] = field(default_factory=dict)
    """The hidden states that the stage received, by the micro-batch's index; empty for the first stage."""
    outputs: dict[int, Any] = field(default_factory=dict)
    """The outputs of the model on the last stage, hidden states on any other; by the micro-batch's index."""

    def take(self) -> "KeptPasses":
        """The passes, which are not kept here any longer."""
        taken = KeptPasses(0, self.received, self.outputs)
        self.received, self.outputs = {}, {}
        return taken
