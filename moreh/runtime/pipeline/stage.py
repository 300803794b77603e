"""A stage of a pipeline: some layers of a model, computed by the model's own forward pass.

The model's code runs unchanged, so that masks, positions and rotary angles are its own. While a stage computes, modules
of other stages are replaced by substitutes that compute nothing: embeddings give zeros, layers hand on what they get. The first
layer of the stage takes the hidden states that were received, and what its last layer returns is kept to be sent on.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moreh.models.parts import ModelParts, ModuleSlot

_WARNING = "warn_if_padding_and_no_attention_mask"
# Given what the model returned for a micro-batch and the micro-batch's number, what the last stage returns.
OutputFn = Callable[[Any, int], torch.Tensor]
# Given the micro-batch's number, the positions in its flattened [batch * sequence] whose logits are wanted; None for all.
LogitPositions = Callable[[int], torch.Tensor | None]


class Stage(nn.Module):
    """The layers `first` to `last` (not included) of a model, with what is before or after them where it is at an end.

    Its parameters are those of the modules it computes. `inputs(micro_batch)` gives what the model is called with,
    the token ids among it; every stage needs the masks. A stage that is not the last returns hidden states
    `[batch, sequence, hidden]`. Where `wanted(micro_batch)` gives positions, logits are `[1, positions, vocabulary]`.
    """

    def __init__(
        self,
        decoder: ModelParts,
        first: int,
        last: int,
        inputs: Callable[[int], dict[str, Any]],
        finish: OutputFn,
        wanted: LogitPositions,
    ) -> None:
        super().__init__()
        places = decoder.layer_slots
        self.is_first, self.is_last = first == 0, last == len(places)
        ends = [*(decoder.before if self.is_first else ()), *(decoder.after if self.is_last else ())]
        self.layers = nn.ModuleList(place.module for place in places[first:last])
        self.ends = nn.ModuleList(place.module for place in ends)
        self._inputs, self._finish, self._wanted = inputs, finish, wanted
        # Not registered: the stage's parameters are those of its parts.
        self._hidden: dict[str, Any] = {"received": None, "sent": None, "started": False, "wanted": None}
        self._outside = _ModelView(decoder.causal, self._substitute(decoder, places, first, last))

    def _substitute(
        self, decoder: ModelParts, places: tuple[ModuleSlot, ...], first: int, last: int
    ) -> list[tuple[ModuleSlot, nn.Module]]:
        hidden = self._hidden
        found: list[tuple[ModuleSlot, nn.Module]] = []
        if not self.is_first:
            found += [(place, _EmbeddingStub(place.module, hidden)) for place in decoder.before]
        if not self.is_last:
            found += [(place, _HeadStub(place.module, hidden)) for place in decoder.after]
            found += [(place, _TupleTolerantNorm(place.module)) for place in decoder.parameterless_norms]
        else:
            head = decoder.causal.get_output_embeddings()
            found += [(place, _HeadAtPositions(head, hidden)) for place in decoder.after if place.module is head]
            found += [(place, _LastMlpAtPositions(place, hidden)) for place in _mlp_slots(places[-1].module)]
        for index, place in enumerate(places):
            if not first <= index < last:
                found.append((place, _PassThrough(place.module)))
            elif (index == first and not self.is_first) or (index == last - 1 and not self.is_last) or index == first:
                found.append(
                    (
                        place,
                        _BoundaryLayer(
                            place.module,
                            hidden,
                            receives=index == first and not self.is_first,
                            sends=index == last - 1 and not self.is_last,
                        ),
                    )
                )
        return found

    def forward(self, received: torch.Tensor | None = None, *, micro_batch: torch.Tensor) -> torch.Tensor:
        """Compute a micro-batch: hidden states to send on, or what the last stage's `finish` makes of the model's outputs.

        `micro_batch` is a number in a tensor `[1]`, since schedules of torch cut tensors into micro-batches.
        """
        number = int(micro_batch)
        inputs = self._inputs(number)
        tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        wanted = self._wanted(number) if self.is_last else None
        self._hidden.update(received=received, sent=None, started=False, tokens=tokens.shape[:2], wanted=wanted)
        with self._in_place():
            # On other stages the output layer would compute on what is not there; its model ends before it.
            model = self._outside.causal if self.is_last else self._outside.causal.base_model
            outputs = model(**inputs)
        sent = self._hidden["sent"]
        self._hidden.update(received=None, sent=None)
        return self._finish(outputs, number) if self.is_last else sent

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The substitutes in the places of what other stages compute."""
        base = self._outside.causal.base_model
        # Masks of what no loss depends on are left out on purpose.
        base.__dict__[_WARNING] = lambda *given, **named: None
        try:
            for place, substitute in self._outside.substitutes:
                place.parent._modules[place.key] = substitute
            yield
        finally:
            del base.__dict__[_WARNING]
            for place, _ in self._outside.substitutes:
                place.parent._modules[place.key] = place.module


@dataclass(frozen=True)
class _ModelView:
    """What a stage uses without having it as a submodule: the whole model, and what stands in for its other parts."""

    causal: Any
    substitutes: list[tuple[ModuleSlot, nn.Module]]


class _Substitute(nn.Module):
    """Stands in a module's place and shows its attributes, which the model's code may read."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_original", original)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_original"), name)


class _EmbeddingStub(_Substitute):
    """An embedding, or another module before the layers, of which only the shape of the result matters here."""

    def __init__(self, original: nn.Module, hidden: dict[str, Any]) -> None:
        super().__init__(original)
        object.__setattr__(self, "_hidden", hidden)

    def forward(self, given: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._hidden["started"]:
            raise RuntimeError(
                f"{type(self._original).__name__} is used after layers: its model cannot be cut into stages"
            )
        received = self._hidden["received"]
        width = getattr(self._original, "embedding_dim", getattr(self._original, "out_features", None))
        shape = (
            (*given.shape, width)
            if isinstance(self._original, nn.Embedding)
            else (*given.shape[:-1], width or given.shape[-1])
        )
        return received.new_zeros(()).expand(shape)


class _HeadStub(_Substitute):
    """A module after the layers, of which only the shape of the result matters here: that of the whole sequences, of which
    this rank may have computed a part.
    """

    def __init__(self, original: nn.Module, hidden: dict[str, Any]) -> None:
        super().__init__(original)
        object.__setattr__(self, "_hidden", hidden)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sent = self._hidden["sent"]
        if sent is None:
            raise RuntimeError(
                f"{type(self._original).__name__} is used before layers: its model cannot be cut into stages"
            )
        return sent.new_zeros(()).expand(*self._hidden["tokens"], sent.shape[-1])


class _TupleTolerantNorm(_Substitute):
    """A norm without parameters, which families such as nanochat use before the layers, too. What it would be given after them
    is a tuple of another stage's layer, or matters to nobody.
    """

    def forward(self, given: Any) -> Any:
        return self._original(given) if isinstance(given, torch.Tensor) else given[0]


class _HeadAtPositions(_Substitute):
    """The output layer at the wanted positions only: in small models it is the largest matrix."""

    def __init__(self, original: nn.Module, hidden: dict[str, Any]) -> None:
        super().__init__(original)
        object.__setattr__(self, "_hidden", hidden)

    def forward(self, given: torch.Tensor) -> Any:
        wanted = self._hidden["wanted"]
        if wanted is not None:
            given = given.flatten(0, 1).index_select(0, wanted).unsqueeze(0)
        return self._original(given)


class _LastMlpAtPositions(_Substitute):
    """The MLP of the last layer at the wanted positions only: what it gives for others reaches no output that is wanted.

    Not where the layer is recomputed, which happens when the substitutes are gone.
    """

    def __init__(self, place: ModuleSlot, hidden: dict[str, Any]) -> None:
        super().__init__(place.module)
        object.__setattr__(self, "_layer", place.parent)
        object.__setattr__(self, "_hidden", hidden)

    def forward(self, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        wanted = self._hidden["wanted"]
        if wanted is None or self._layer.gradient_checkpointing or args or kwargs:
            return self._original(given, *args, **kwargs)
        found = self._original(given.flatten(0, 1).index_select(0, wanted).unsqueeze(0)).squeeze(0)
        return (
            found.new_zeros(given.shape[0] * given.shape[1], found.shape[-1])
            .index_copy(0, wanted, found)
            .view(given.shape)
        )


def _mlp_slots(layer: nn.Module) -> list[ModuleSlot]:
    """The MLP of a layer, if it treats each token by itself and the layer says whether it is recomputed."""
    mlp = layer._modules.get("mlp")
    if mlp is None or not isinstance(layer, GradientCheckpointingLayer):
        return []
    if any(re.search("expert|router", name) for name, _ in mlp.named_modules()):
        return []
    return [ModuleSlot(layer, "mlp", mlp)]


class _PassThrough(_Substitute):
    """A layer of another stage. The tuple suits models that take the first of what a layer returns, and those that do not:
    no layer of this stage looks at it.
    """

    def forward(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        return (given,)


class _BoundaryLayer(_Substitute):
    """The first or the last layer of a stage.

    It surrounds the layer instead of hooking into it: recomputation repeats the layer with its hooks, when another
    micro-batch may have been received.
    """

    def __init__(self, original: nn.Module, hidden: dict[str, Any], *, receives: bool, sends: bool) -> None:
        super().__init__(original)
        object.__setattr__(self, "_hidden", hidden)
        object.__setattr__(self, "_receives", receives)
        object.__setattr__(self, "_sends", sends)

    def forward(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        self._hidden["started"] = True
        outputs = self._original(self._hidden["received"] if self._receives else given, *args, **kwargs)
        if self._sends:
            self._hidden["sent"] = outputs[0] if isinstance(outputs, tuple) else outputs
        return outputs
