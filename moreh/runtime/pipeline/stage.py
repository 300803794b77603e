"""A pipeline stage: some layers of a model, computed by the model's own forward pass.

The model's code runs unchanged, so masks, positions and rotary angles are its own. While a stage computes, stubs
(stubs.py) are in the slots of other stages' modules: embeddings return zeros, layers pass on their input. The first
layer of the stage takes the hidden states that the stage received. The stage sends its last layer's output.

A model on one worker is one stage.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moreh import trace
from moreh.models.parts import ModelParts, ModuleSlot
from moreh.patches.row_boundaries import one_sequence_in_each_row
from moreh.runtime.pipeline.kept_passes import KeptPasses
from moreh.runtime.pipeline.stubs import (
    BoundaryLayer,
    EmbeddingStub,
    HeadAtPositions,
    HeadStub,
    LastMlpAtPositions,
    PassThrough,
    StageState,
    Stub,
    TupleTolerantNorm,
    mlp_slots,
)

# A method of transformers' models. It warns of padding without an attention mask.
_PADDING_WARNING = "warn_if_padding_and_no_attention_mask"
# Makes the last stage's result of the model's outputs for a micro-batch and the micro-batch's index.
OutputFn = Callable[[Any, int], torch.Tensor]
# Given a micro-batch's index, the positions in its flattened [batch * sequence] whose logits are needed; None for all.
LogitPositions = Callable[[int], torch.Tensor | None]


class Stage(nn.Module):
    """The layers `first` to `last - 1` of a model; in the first and last stage, also the modules before or after them.

    The parameters of a stage are those of the modules that it computes. A call uses the forward pass that `kept` has
    for its micro-batch, or may add one.
    """

    def __init__(
        self,
        parts: ModelParts,
        first: int,
        last: int,
        inputs: Callable[[int], dict[str, Any]],
        output_fn: OutputFn,
        logit_positions: LogitPositions,
    ) -> None:
        """Make a stage.

        Args:
            parts: The model.
            first: Index of the stage's first layer.
            last: Index after the stage's last layer.
            inputs: Given a micro-batch's index, the arguments of the model. Every stage needs the token ids for masks
                and positions.
            output_fn: Makes the last stage's result of the model's outputs and the index.
            logit_positions: Given the index, the positions whose logits are needed, or None for all. With positions,
                the model's logits are [1, positions, vocabulary].
        """
        super().__init__()
        slots = parts.layer_slots
        self.is_first, self.is_last = first == 0, last == len(slots)
        ends = [*(parts.pre_layers if self.is_first else ()), *(parts.post_layers if self.is_last else ())]
        self.layers = nn.ModuleList(slot.module for slot in slots[first:last])
        self.ends = nn.ModuleList(slot.module for slot in ends)
        self._inputs, self._output_fn, self._logit_positions = inputs, output_fn, logit_positions
        self._state = StageState()
        self.kept = KeptPasses()
        self._model = _Model(parts.causal, self._make_stubs(parts, slots, first, last))

    def _make_stubs(
        self, parts: ModelParts, slots: tuple[ModuleSlot, ...], first: int, last: int
    ) -> list[tuple[ModuleSlot, Stub]]:
        """The stubs of this stage, each with the slot that it is put into."""
        state = self._state
        stubs: list[tuple[ModuleSlot, Stub]] = []
        if not self.is_first:
            stubs += [(slot, EmbeddingStub(slot.module, state)) for slot in parts.pre_layers]
        if not self.is_last:
            stubs += [(slot, HeadStub(slot.module, state)) for slot in parts.post_layers]
            stubs += [(slot, TupleTolerantNorm(slot.module, state)) for slot in parts.parameterless_norms]
        else:
            head = parts.causal.get_output_embeddings()
            stubs += [(slot, HeadAtPositions(head, state)) for slot in parts.post_layers if slot.module is head]
            stubs += [(slot, LastMlpAtPositions(slot, state)) for slot in mlp_slots(slots[-1].module)]
        for index, slot in enumerate(slots):
            receives = index == first and not self.is_first
            sends = index == last - 1 and not self.is_last
            if not first <= index < last:
                stubs.append((slot, PassThrough(slot.module, state)))
            elif index == first or sends:
                stubs.append((slot, BoundaryLayer(slot.module, state, receives=receives, sends=sends)))
        return stubs

    def forward(self, received: torch.Tensor | None = None, *, micro_batch: torch.Tensor) -> torch.Tensor:
        """Compute a micro-batch.

        Args:
            received: Hidden states from the previous stage, [batch, sequence, hidden]; None on the first stage.
            micro_batch: The micro-batch's index in a tensor [1], because torch's schedules cut tensors into
                micro-batches.

        Returns:
            Hidden states for the next stage, [batch, sequence, hidden]; on the last stage the result of `output_fn`.
        """
        with trace.span("stage_forward"):
            index = int(micro_batch)
            inputs = self._inputs(index)
            outputs = self.kept.outputs.pop(index, None)
            if outputs is None:
                outputs = self._compute(index, inputs, received)
            result: torch.Tensor = self._output_fn(outputs, index) if self.is_last else outputs
            if torch.is_grad_enabled() and index < self.kept.count:
                self.kept.outputs[index] = outputs
            return result

    def _compute(self, index: int, inputs: dict[str, Any], received: torch.Tensor | None) -> Any:
        """The outputs of the model's forward pass on the last stage, the hidden states on any other."""
        tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        state = self._state
        state.received, state.sent, state.layers_started = received, None, False
        state.batch_shape = tuple(tokens.shape[:2])
        state.logit_positions = self._logit_positions(index) if self.is_last else None
        with self._stubs_in_slots(), one_sequence_in_each_row(inputs):
            # Other stages have no hidden states for the output layer, which is outside the base model.
            model = self._model.causal if self.is_last else self._model.causal.base_model
            outputs = model(**inputs)
        sent = state.sent
        # No tensor of the micro-batch outlives its use.
        state.received = state.sent = None
        if self.is_last:
            return outputs
        assert sent is not None
        return sent

    @contextmanager
    def _stubs_in_slots(self) -> Iterator[None]:
        """Put the stubs into the model for the time of a forward pass.

        The swap is in `_modules`, where `nn.Module` looks submodules up. It is made for each forward pass, because the
        stages of a rank share one model but have different stubs. Between forward passes the model is whole: the script
        can read its parameters, save it or evaluate it.
        """
        base_model = self._model.causal.base_model
        # The runtime omits masks that hide only positions without effect on the loss, so the warning would be wrong.
        base_model.__dict__[_PADDING_WARNING] = lambda *args, **kwargs: None
        try:
            for slot, stub in self._model.stubs:
                slot.parent._modules[slot.key] = stub
            yield
        finally:
            del base_model.__dict__[_PADDING_WARNING]
            for slot, _ in self._model.stubs:
                slot.parent._modules[slot.key] = slot.module


@dataclass(frozen=True)
class _Model:
    """The whole model and the stubs, in an object that is not a module, so that the stage does not register them."""

    causal: Any
    """The causal language model of transformers."""
    stubs: list[tuple[ModuleSlot, Stub]]
    """The stubs with their slots."""
