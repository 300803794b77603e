"""What a decoder-only language model consists of, as far as planning needs it: matrix products, attention, tables.

Counts are exact: `Architecture.parameters` is what `sum(p.numel() for p in model.parameters())` gives for the model of
transformers (tests/models/test_architecture.py). Elements are numbers in a tensor; nothing here has a unit of bytes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# How tensor parallelism divides a matrix: by its outputs (column), by its inputs (row), or not at all.
Split = Literal["column", "row", "none"]


@dataclass(frozen=True)
class Linear:
    """A matrix product `[tokens, inputs] -> [tokens, outputs]`, with a bias or without.

    `copies` matrices of this shape exist and each token passes through `active` of them: experts of a mixture. All copies
    are one tensor where `stacked`. A frozen one has no gradient and no optimizer state (PEFT).
    """

    name: str
    inputs: int
    outputs: int
    split: Split
    bias: bool = False
    copies: int = 1
    active: int = 1
    frozen: bool = False
    stacked: bool = False

    @property
    def parameters(self) -> int:
        """Weights and biases of all copies."""
        return self.copies * (self.inputs * self.outputs + (self.outputs if self.bias else 0))

    @property
    def sharded_parameters(self) -> int:
        """The parameters that tensor parallelism divides: a row-split matrix keeps its bias whole."""
        if self.split == "none":
            return 0
        return self.copies * (
            self.inputs * self.outputs + (self.outputs if self.bias and self.split == "column" else 0)
        )

    @property
    def tensors(self) -> int:
        """How many parameter tensors there are."""
        return (1 if self.stacked else self.copies) * (2 if self.bias else 1)


@dataclass(frozen=True)
class DecoderLayer:
    """One block: attention with `heads` query heads and `kv_heads` key-value heads, and a feed-forward network.

    `window` is the number of positions that sliding-window attention sees, None for all. `other_parameters` are those in
    no matrix (norms), in `other_tensors` tensors, of which the `frozen_other` ones have no gradient.
    """

    heads: int
    kv_heads: int
    head_dim: int
    linears: tuple[Linear, ...]
    other_parameters: int
    other_tensors: int
    window: int | None = None
    frozen_other_parameters: int = 0
    frozen_other_tensors: int = 0

    @property
    def parameters(self) -> int:
        """All parameters of the layer."""
        return self.other_parameters + sum(linear.parameters for linear in self.linears)

    @property
    def trainable_parameters(self) -> int:
        """Parameters that have a gradient and optimizer state."""
        others = self.other_parameters - self.frozen_other_parameters
        return others + sum(linear.parameters for linear in self.linears if not linear.frozen)

    @property
    def sharded_parameters(self) -> int:
        """Parameters that tensor parallelism divides among its ranks; the rest are on each of them."""
        return sum(linear.sharded_parameters for linear in self.linears)

    @property
    def trainable_sharded_parameters(self) -> int:
        """Parameters that tensor parallelism divides and that have a gradient."""
        return sum(linear.sharded_parameters for linear in self.linears if not linear.frozen)

    @property
    def trainable_tensors(self) -> int:
        """Parameter tensors that have a gradient."""
        others = self.other_tensors - self.frozen_other_tensors
        return others + sum(linear.tensors for linear in self.linears if not linear.frozen)


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model: a token embedding, `layers`, a final norm and an output layer over the vocabulary.

    `family` is the model type of transformers. `table_parameters` are embeddings besides the tokens' (learned positions)
    and whatever stands before the first layer; `final_parameters` stand after the last one, without the output layer.
    The output layer is the token embedding itself where `tied`. What is frozen has no gradient: `embedding_frozen` says it of
    the token embedding (and so of a tied output layer), `head_frozen` of the output layer's own tensors. `gated`
    feed-forward networks multiply two products.
    """

    name: str
    family: str
    hidden: int
    vocabulary: int
    layers: tuple[DecoderLayer, ...]
    tied: bool
    gated: bool
    norm: Literal["rms", "layer"]
    rotary: bool
    dropout: bool
    table_parameters: int = 0
    table_tensors: int = 0
    final_parameters: int = 0
    final_tensors: int = 0
    head_bias: bool = False
    embedding_dim: int = 0
    embedding_frozen: bool = False
    head_frozen: bool = False
    frozen_table_parameters: int = 0
    frozen_table_tensors: int = 0
    frozen_final_parameters: int = 0
    frozen_final_tensors: int = 0
    max_positions: int | None = None

    @property
    def embedding_parameters(self) -> int:
        """The token embedding."""
        return self.vocabulary * (self.embedding_dim or self.hidden)

    @property
    def head_parameters(self) -> int:
        """The output layer as the last stage of a pipeline holds it: its own, or the tied embedding's copy."""
        return self.embedding_parameters + (self.vocabulary if self.head_bias else 0)

    @property
    def own_head_parameters(self) -> int:
        """The output layer without what it shares with the token embedding."""
        return self.head_parameters - (self.embedding_parameters if self.tied else 0)

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        outside = self.embedding_parameters + self.table_parameters + self.final_parameters + self.own_head_parameters
        return outside + sum(layer.parameters for layer in self.layers)

    @property
    def trainable_parameters(self) -> int:
        """Parameters that have a gradient and optimizer state, tied ones once."""
        outside = self.table_parameters - self.frozen_table_parameters
        outside += self.final_parameters - self.frozen_final_parameters
        outside += 0 if self.embedding_frozen else self.embedding_parameters
        outside += 0 if self.head_frozen else self.own_head_parameters
        return outside + sum(layer.trainable_parameters for layer in self.layers)

    @property
    def trainable_tensors(self) -> int:
        """Parameter tensors that have a gradient, tied ones once. AdamW keeps a 4-byte step count for each."""
        outside = self.table_tensors - self.frozen_table_tensors + self.final_tensors - self.frozen_final_tensors
        outside += 0 if self.embedding_frozen else 1
        outside += 0 if self.head_frozen else (0 if self.tied else 1) + (1 if self.head_bias else 0)
        return outside + sum(layer.trainable_tensors for layer in self.layers)

    def layer_kinds(self) -> Iterator[tuple[DecoderLayer, int]]:
        """The different layers, each with how many there are of it, in the order in which they first occur."""
        # Most layers are the same object: comparing all of them with each other would take longer than a search.
        objects = {id(layer): layer for layer in self.layers}
        repeats = Counter(map(id, self.layers))
        counts: dict[DecoderLayer, int] = {}
        for identity, layer in objects.items():
            counts[layer] = counts.get(layer, 0) + repeats[identity]
        yield from counts.items()
