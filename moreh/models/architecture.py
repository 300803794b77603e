"""Description of a decoder-only language model for planning: matmuls, attention, embedding tables.

Counts are exact: `Architecture.parameters` is `sum(p.numel() for p in model.parameters())` of the model in transformers
(tests/models/test_architecture.py). All counts are elements or tensors; nothing here has a unit of bytes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# How tensor parallelism splits a matrix: by its outputs (column), by its inputs (row), or not at all.
Split = Literal["column", "row", "none"]


@dataclass(frozen=True)
class Linear:
    """A matmul `[tokens, inputs] -> [tokens, outputs]` with the weights of a layer."""

    name: str
    """The name of the module in its layer, such as "self_attn.q_proj"."""
    inputs: int
    """Input features."""
    outputs: int
    """Output features."""
    split: Split
    """The split of the weights by tensor parallelism."""
    bias: bool = False
    """True if there is a bias, trained or frozen like the weights."""
    copies: int = 1
    """Number of matrices of this shape in the layer: the experts of a mixture."""
    active: int = 1
    """Number of the copies that a token passes through."""
    frozen: bool = False
    """True if the weights are not trained (PEFT): they have no gradient and no optimizer state."""
    stacked: bool = False
    """True if all copies are one tensor, [copies, ...]."""
    bare: bool = False
    """True if the weights are a parameter of a module that is more than a matmul: a router."""
    dropped_input: bool = False
    """True if the input passes a dropout that other matrices' inputs do not pass: that of a LoRA adapter."""

    @property
    def is_second_of_adapter(self) -> bool:
        """True if this is matrix B of a LoRA adapter, whose input is the output of matrix A."""
        return ".lora_B." in self.name

    @property
    def in_attention(self) -> bool:
        """True if the matrix belongs to attention, by its name, and not to the feed-forward network."""
        return "attn" in self.name or "attention" in self.name

    @property
    def is_expert(self) -> bool:
        """True if the copies are experts of a mixture, of which a token passes through some."""
        return self.copies > self.active

    @property
    def is_trained_matrix(self) -> bool:
        """True if each copy is a trained tensor of two dimensions, which Muon, for example, updates as a whole."""
        return not self.frozen and not self.stacked

    @property
    def parameters(self) -> int:
        """Weights and biases of all copies."""
        return self.copies * (self.inputs * self.outputs + (self.outputs if self.bias else 0))

    @property
    def sharded_parameters(self) -> int:
        """The parameters that tensor parallelism splits. The bias of a row-split matrix is whole on each rank."""
        if self.split == "none":
            return 0
        return self.copies * (
            self.inputs * self.outputs + (self.outputs if self.bias and self.split == "column" else 0)
        )

    @property
    def tensors(self) -> int:
        """Number of parameter tensors."""
        return (1 if self.stacked else self.copies) * (2 if self.bias else 1)


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: attention and a feed-forward network."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key-value heads."""
    head_dim: int
    """Elements of a head; the mean of queries and values where these differ."""
    linears: tuple[Linear, ...]
    """The matrices, in the order of the modules."""
    other_parameters: int
    """Parameters outside the matrices: norms."""
    other_tensors: int
    """The tensors that `other_parameters` are in."""
    window: int | None = None
    """The positions that sliding-window attention sees; None for all."""
    state_elements: int = 0
    """Elements of the state of linear attention, over all heads; 0 for attention over positions."""
    frozen_other_parameters: int = 0
    """The part of `other_parameters` that is not trained."""
    frozen_other_tensors: int = 0
    """The part of `other_tensors` that is not trained."""

    @property
    def parameters(self) -> int:
        """All parameters of the layer."""
        return self.other_parameters + sum(linear.parameters for linear in self.linears)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token passes through: of experts only those that it is routed to."""
        idle = sum(linear.parameters * (linear.copies - linear.active) // linear.copies for linear in self.linears)
        return self.parameters - idle

    @property
    def trainable_parameters(self) -> int:
        """Parameters that have a gradient and optimizer state."""
        others = self.other_parameters - self.frozen_other_parameters
        return others + sum(linear.parameters for linear in self.linears if not linear.frozen)

    @property
    def sharded_parameters(self) -> int:
        """Parameters that tensor parallelism splits over its ranks; the others are on each of them."""
        return sum(linear.sharded_parameters for linear in self.linears)

    @property
    def trainable_sharded_parameters(self) -> int:
        """Parameters that tensor parallelism splits and that have a gradient."""
        return sum(linear.sharded_parameters for linear in self.linears if not linear.frozen)

    @property
    def trainable_tensors(self) -> int:
        """Parameter tensors that have a gradient."""
        others = self.other_tensors - self.frozen_other_tensors
        return others + sum(linear.tensors for linear in self.linears if not linear.frozen)


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model: a token embedding, layers, a final norm and an output layer over the vocabulary."""

    name: str
    """The user's name for the model, for reports."""
    family: str
    """The model type of transformers, such as "llama"."""
    hidden: int
    """Elements of a hidden state."""
    vocabulary: int
    """Rows of the token embedding and of the output layer."""
    layers: tuple[DecoderLayer, ...]
    """The layers, from the first to the last; equal ones may be one object."""
    tied: bool
    """True if the token embedding is the weight of the output layer too."""
    gated: bool
    """True if feed-forward networks multiply two projections, one of which has passed the activation."""
    norm: Literal["rms", "layer"]
    """The kind of norm."""
    rotary: bool
    """True if positions are rotary embeddings."""
    dropout: bool
    """True if the model has dropout in training."""
    table_parameters: int = 0
    """Parameters before the first layer besides the token embedding: learned positions, a norm."""
    table_tensors: int = 0
    """The tensors that `table_parameters` are in."""
    final_parameters: int = 0
    """Parameters after the last layer without the output layer: the final norm."""
    final_tensors: int = 0
    """The tensors that `final_parameters` are in."""
    head_bias: bool = False
    """True if the output layer has a bias."""
    embedding_dim: int = 0
    """Elements of a row of the token embedding; 0 stands for `hidden`."""
    embedding_frozen: bool = False
    """True if the token embedding, and so a tied output layer's weight, is not trained."""
    head_frozen: bool = False
    """True if the output layer's own tensors are frozen: only its bias if tied, else its weight too."""
    frozen_table_parameters: int = 0
    """The part of `table_parameters` that is not trained."""
    frozen_table_tensors: int = 0
    """The part of `table_tensors` that is not trained."""
    frozen_final_parameters: int = 0
    """The part of `final_parameters` that is not trained."""
    frozen_final_tensors: int = 0
    """The part of `final_tensors` that is not trained."""
    max_positions: int | None = None
    """The longest sequence that the model is made for, in tokens; None where no length is given."""

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding."""
        return self.vocabulary * (self.embedding_dim or self.hidden)

    @property
    def head_parameters(self) -> int:
        """Parameters of the output layer on the last pipeline stage, with its copy of a tied embedding."""
        return self.embedding_parameters + (self.vocabulary if self.head_bias else 0)

    @property
    def own_head_parameters(self) -> int:
        """Parameters of the output layer that it does not share with the token embedding."""
        return self.head_parameters - (self.embedding_parameters if self.tied else 0)

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        outside = self.embedding_parameters + self.table_parameters + self.final_parameters + self.own_head_parameters
        return outside + sum(layer.parameters for layer in self.layers)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token passes through, tied ones once."""
        return self.parameters - sum(layer.parameters - layer.active_parameters for layer in self.layers)

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
        """The distinct layers with the number of each, in the order in which they first occur."""
        # Most layers are one object. Comparing all layers field by field would take longer than a search for plans.
        objects = {id(layer): layer for layer in self.layers}
        repeats = Counter(map(id, self.layers))
        counts: dict[DecoderLayer, int] = {}
        for identity, layer in objects.items():
            counts[layer] = counts.get(layer, 0) + repeats[identity]
        yield from counts.items()
