"""Stand-ins for modules while a pipeline stage runs the whole model's forward pass.

Stubs for modules of other stages compute nothing. The stage's first layer takes the hidden states that the stage
received, and its last layer keeps those that the stage sends. The output layer and the last MLP compute only the
positions whose logits are needed.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moreh.models.parts import ModuleSlot


@dataclass
class StageState:
    """The stubs' state for the micro-batch that the stage is computing."""

    received: torch.Tensor | None = None
    """Hidden states from the previous stage, [batch, sequence, hidden]; None on the first stage."""
    sent: torch.Tensor | None = None
    """Hidden states for the next stage, computed by the stage's last layer; None until then and on the last stage."""
    layers_started: bool = False
    """True if a layer of the stage has been called."""
    batch_shape: tuple[int, int] = (0, 0)
    """[batch, sequence] of the micro-batch. With sequence parallelism hidden states have a part of the sequence."""
    logit_positions: torch.Tensor | None = None
    """The positions in the flattened [batch * sequence] whose logits are needed, on the last stage; None for all."""


class Stub(nn.Module):
    """A stand-in in a module's slot. It shows the attributes of the module, which the model's code may read."""

    _original: nn.Module
    _state: StageState

    def __init__(self, original: nn.Module, state: StageState) -> None:
        super().__init__()
        # Not registered as a submodule, because the parameters of other stages are not this stage's.
        object.__setattr__(self, "_original", original)
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_original"), name)


class EmbeddingStub(Stub):
    """Stands in for an embedding, or another module before the layers: zeros of the shape that it would return.

    The model may make masks and positions from that shape. The first layer of the stage ignores the zeros.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Zeros: [batch, sequence, embedding_dim] for token ids or positions, [..., out_features] for hidden states."""
        if self._state.layers_started:
            raise RuntimeError(
                f"{type(self._original).__name__} is used after layers: its model cannot be cut into stages"
            )
        received = self._state.received
        assert received is not None
        width = getattr(self._original, "embedding_dim", getattr(self._original, "out_features", None))
        is_lookup = isinstance(self._original, nn.Embedding)
        shape = (*x.shape, width) if is_lookup else (*x.shape[:-1], width or x.shape[-1])
        return received.new_zeros(()).expand(shape)


class HeadStub(Stub):
    """Stands in for a module after the layers, such as the final norm. No result depends on its output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the shape of whole sequences, [batch, sequence, hidden]."""
        sent = self._state.sent
        if sent is None:
            raise RuntimeError(
                f"{type(self._original).__name__} is used before layers: its model cannot be cut into stages"
            )
        return sent.new_zeros(()).expand(*self._state.batch_shape, sent.shape[-1])


class TupleTolerantNorm(Stub):
    """A norm without parameters that also takes the tuple of a PassThrough layer.

    Families such as nanochat use one such norm before the layers and after them. Before the layers it has to compute.
    After the layers, on all stages but the last, no result depends on it, and its argument may be a tuple.
    """

    def forward(self, x: Any) -> Any:
        """The norm of hidden states; the content of a tuple is returned unchanged."""
        return self._original(x) if isinstance(x, torch.Tensor) else x[0]


class HeadAtPositions(Stub):
    """The output layer at the positions whose logits are needed: in small models it is the largest matrix."""

    def forward(self, x: torch.Tensor) -> Any:
        """Logits [1, positions, vocabulary], or of all positions, [batch, sequence, vocabulary]."""
        positions = self._state.logit_positions
        if positions is not None:
            x = x.flatten(0, 1).index_select(0, positions).unsqueeze(0)
        return self._original(x)


class LastMlpAtPositions(Stub):
    """The MLP of the last layer at the positions whose logits are needed, zeros elsewhere.

    After the last attention no position sees another one, so results elsewhere reach no logits that are needed. Where
    the layer is recomputed, the MLP computes all positions: recomputation has to repeat what the forward pass did, but
    takes place when the stub is gone.
    """

    _layer: Any

    def __init__(self, slot: ModuleSlot, state: StageState) -> None:
        super().__init__(slot.module, state)
        object.__setattr__(self, "_layer", slot.parent)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The MLP's output for hidden states [batch, sequence, hidden]."""
        positions = self._state.logit_positions
        if positions is None or self._layer.gradient_checkpointing or args or kwargs:
            return self._original(x, *args, **kwargs)
        out = self._original(x.flatten(0, 1).index_select(0, positions).unsqueeze(0)).squeeze(0)
        zeros = out.new_zeros(x.shape[0] * x.shape[1], out.shape[-1])
        return zeros.index_copy(0, positions, out).view(x.shape)


def mlp_slots(layer: nn.Module) -> list[ModuleSlot]:
    """The slot of a layer's MLP if the MLP is token-wise and the layer tells whether it is recomputed; else none."""
    mlp = layer._modules.get("mlp")
    if mlp is None or not isinstance(layer, GradientCheckpointingLayer):
        return []
    if any(re.search("expert|router", name) for name, _ in mlp.named_modules()):
        return []
    return [ModuleSlot(layer, "mlp", mlp)]


class PassThrough(Stub):
    """Stands in for a layer of another stage: returns its input as a 1-tuple.

    A model that takes `outputs[0]` of a layer works with a tuple. A model that takes the outputs works too, because no
    layer of this stage computes with the value.
    """

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The hidden states as they are."""
        return (x,)


class BoundaryLayer(Stub):
    """The first or the last layer of a stage, or both: takes the received hidden states, keeps those to send.

    It wraps the layer instead of hooking into it. Recomputation would repeat the hooks of a layer, when the stage may
    have received another micro-batch already.
    """

    def __init__(self, original: nn.Module, state: StageState, *, receives: bool, sends: bool) -> None:
        super().__init__(original, state)
        self._receives = receives
        self._sends = sends

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        self._state.layers_started = True
        outputs = self._original(self._state.received if self._receives else x, *args, **kwargs)
        if self._sends:
            self._state.sent = outputs[0] if isinstance(outputs, tuple) else outputs
        return outputs
