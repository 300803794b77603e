"""What a model on several workers returns for a batch with labels."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from moreh.errors import OptionError


@dataclass
class LossOutput(ModelOutput):
    """What a divided model returns for a batch with labels: the loss. The logits exist only in pieces, on different workers."""

    loss: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "logits":
            raise OptionError(
                "logits of a batch with labels: a model that is divided over workers does not keep them; "
                "call it without labels, under torch.no_grad(), for logits"
            )
        raise AttributeError(f"{type(self).__name__} has no {name}: it has the loss")
