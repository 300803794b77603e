"""Decides which parameters tensor-parallel ranks split, and which models they cannot split.

Only names and shapes matter. So a model may be on the meta device, as when the planner asks before there are weights.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moreh.errors import PlanError
from moreh.models.families import FAMILIES
from moreh.models.families.tp_blocks import AttentionShape, Experts, TPBlock
from moreh.models.introspection import is_matrix, text_config
from moreh.models.lora import base_matrix, lora_pairs
from moreh.models.parts import ModelParts, split_into_parts
from moreh.runtime.sharding.spec import TPSplit
from moreh.runtime.tensor.blocks import attention_shape, tp_blocks
from moreh.runtime.tensor.experts import split_experts, whole_parameters

# How messages about models that cannot be split end.
_REMEDY = "use tensor parallelism of size 1"


@dataclass(frozen=True)
class TensorPartition:
    """The split of a model's parameters over tensor-parallel ranks, by their names in `named_parameters()`."""

    splits: dict[str, TPSplit]
    """The parameters that are split, and how. All others are the same on every rank."""
    partial_gradients: frozenset[str]
    """The unsplit parameters with partial gradients: each rank computes a part, and the parts are summed over ranks."""


@dataclass(frozen=True)
class SplittableDecoder:
    """A decoder whose family has tensor-parallel blocks, its parameters whole or already split."""

    parts: ModelParts
    """The model, split into the parts before, in and after its layers."""
    config: Any
    """The configuration of transformers."""
    embedding: nn.Embedding
    """The token embedding."""
    head: nn.Linear
    """The output layer."""
    last: nn.Module
    """The last module that computes on the residual stream: the final norm, or the last layer where there is none."""
    blocks: tuple[TPBlock, ...]
    """The blocks of the layers."""
    experts: Experts | None
    """The experts of layers that have some."""
    whole: tuple[str, ...]
    """The modules of each layer that every rank computes whole."""
    shape: AttentionShape
    """The heads of each layer."""

    def blocks_of(self, layer: nn.Module) -> tuple[TPBlock, ...]:
        """The blocks that a layer has."""
        return tuple(block for block in self.blocks if not block.only_some_layers or has_matrix(layer, block.row))


@dataclass(frozen=True)
class _BlockPartition:
    """The parameters of a block in a layer, by id."""

    splits: dict[int, TPSplit]
    """The parameters that are split."""
    shared: set[int]
    """The parameters that each rank uses for its own heads or features only, so that their gradients are partial."""
    summed: set[int]
    """The parameters used after the sum over the ranks: the bias of the row-split matrix, B of its adapters."""


def max_tensor_parallel(model: nn.Module) -> int:
    """The largest number of ranks that can split a model; 1 where tensor parallelism cannot be used."""
    try:
        shape = splittable_decoder(model).shape
    except PlanError:
        return 1
    sizes = [size for size in range(shape.kv_heads, 1, -1) if shape.kv_heads % size == shape.heads % size == 0]
    return next((size for size in sizes if tensor_parallel_refusal(model, size) is None), 1)


def tensor_parallel_refusal(model: nn.Module, size: int) -> str | None:
    """The reason why `size` ranks cannot split a model, as a sentence for the user; None if they can."""
    return _refusal(model, size, sequence_parallel=False)


def sequence_parallel_refusal(model: nn.Module, size: int) -> str | None:
    """The reason why `size` ranks cannot split a model and its sequences, a sentence for the user; None if they can."""
    return _refusal(model, size, sequence_parallel=True)


def _refusal(model: nn.Module, size: int, *, sequence_parallel: bool) -> str | None:
    try:
        describe_partition(model, size, sequence_parallel=sequence_parallel)
    except PlanError as error:
        return str(error)
    return None


def describe_partition(model: nn.Module, size: int, *, sequence_parallel: bool) -> TensorPartition:
    """The split of a model over `size` ranks.

    Raises:
        PlanError: they cannot; the message gives the reason.
    """
    decoder = splittable_decoder(model)
    _check_sizes(decoder, size, sequence_parallel=sequence_parallel)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    splits: dict[int, TPSplit] = {}
    partial: set[int] = set()
    for layer in decoder.parts.layers:
        summed: set[int] = set()
        if decoder.experts is not None:
            splits |= split_experts(layer, decoder.experts, size)
        for block in decoder.blocks_of(layer):
            partition = _split_block(layer, block, decoder.shape, names)
            splits |= partition.splits
            partial |= partition.shared
            summed |= partition.summed
        known = summed | whole_parameters(layer, decoder.experts, decoder.whole)
        for parameter in layer.parameters():
            if id(parameter) in splits or id(parameter) in partial:
                continue
            if parameter.dim() > 1 and id(parameter) not in known:
                raise PlanError(
                    f"{names[id(parameter)]} is a matrix that the tensor-parallel rules of its family do not know: "
                    f"{_REMEDY}"
                )
            if sequence_parallel:
                # Each rank uses the parameter for its own part of the sequence only.
                partial.add(id(parameter))
    for module in (decoder.embedding, decoder.head):
        splits |= {id(parameter): TPSplit(0, (parameter.shape[0],)) for parameter in module.parameters()}
    for slot in decoder.parts.post_layers:
        # Modules after `last` feed the split output layer, so that their gradients are partial in either mode.
        if sequence_parallel or slot.module is not decoder.last:
            partial |= {id(parameter) for parameter in slot.module.parameters()}
    partial -= set(splits)
    return TensorPartition(
        {names[key]: split for key, split in splits.items()}, frozenset(names[key] for key in partial)
    )


def _check_sizes(decoder: SplittableDecoder, size: int, *, sequence_parallel: bool) -> None:
    """Check that `size` ranks can split the heads, and the sequences.

    Raises:
        PlanError: they cannot.
    """
    layerdrop = getattr(decoder.config, "layerdrop", 0.0)
    if sequence_parallel and layerdrop:
        # The first layer splits the sequences. If it were left out, they would stay whole.
        raise PlanError(
            f"layerdrop is {layerdrop}, which leaves layers out: use no sequence parallelism, or set it to 0"
        )
    if sequence_parallel and decoder.whole:
        raise PlanError(
            f"{type(decoder.parts.causal).__name__}: every tensor-parallel rank computes {', '.join(decoder.whole)} "
            "for whole sequences: use no sequence parallelism"
        )
    groups = max(block.head_groups for block in decoder.blocks)
    counts = {"attention heads": decoder.shape.heads, "key-value heads": decoder.shape.kv_heads}
    if groups > 1:
        counts = {f"attention heads in each of its {groups} groups": decoder.shape.heads // groups}
    for what, count in counts.items():
        if size < 1 or count % size:
            raise PlanError(
                f"{type(decoder.parts.causal).__name__} has {count} {what}, which {size} tensor-parallel ranks cannot "
                f"divide: use a divisor of {count}"
            )


def _split_block(layer: nn.Module, block: TPBlock, shape: AttentionShape, names: dict[int, str]) -> _BlockPartition:
    """The split of a block's parameters.

    Raises:
        PlanError: a parameter belongs to all heads or features together.
    """
    splits: dict[int, TPSplit] = {}
    shared: set[int] = set()
    for name, chunks in block.columns.items():
        column = layer.get_submodule(name)
        matrix = base_matrix(column)
        dim = _output_dim(matrix)
        split = TPSplit(dim, chunks(shape, matrix.weight.shape[dim]))
        splits[id(matrix.weight)] = split
        if matrix.bias is not None:
            splits[id(matrix.bias)] = TPSplit(0, split.chunk_sizes)
        for lora_a, lora_b in lora_pairs(column):
            # Every rank computes with all of A, but for its own outputs.
            shared.add(id(lora_a.weight))
            splits[id(lora_b.weight)] = TPSplit(0, split.chunk_sizes)
    row = layer.get_submodule(block.row)
    matrix = base_matrix(row)
    dim = 1 - _output_dim(matrix)
    split = TPSplit(dim, block.row_chunks(shape, matrix.weight.shape[dim]))
    splits[id(matrix.weight)] = split
    summed = {id(matrix.bias)} if matrix.bias is not None else set()
    for lora_a, lora_b in lora_pairs(row):
        splits[id(lora_a.weight)] = TPSplit(1, split.chunk_sizes)
        summed.add(id(lora_b.weight))
    for name in block.cross_rank_norms:
        weight = layer.get_parameter(f"{name}.weight")
        splits[id(weight)] = TPSplit(0, (weight.shape[0],))
    for name, parameter in layer.get_submodule(block.entry).named_parameters():
        if id(parameter) in splits or id(parameter) in shared | summed:
            continue
        if name not in block.per_head_parameters and _is_for_each_head(name, parameter, block, shape):
            shared.add(id(parameter))
        elif name in block.per_head_parameters or _is_by_head(name, parameter, block, shape):
            splits[id(parameter)] = TPSplit(0, (parameter.shape[0],))
        else:
            raise PlanError(
                f"{names[id(parameter)]} {list(parameter.shape)} belongs to all attention heads or inner features "
                f"together, of which a tensor-parallel rank has only a part: {_REMEDY}"
            )
    return _BlockPartition(splits, shared, summed)


def _is_for_each_head(name: str, parameter: nn.Parameter, block: TPBlock, shape: AttentionShape) -> bool:
    """True if every head uses all of a parameter, such as a norm [head_dim] or a scalar."""
    is_of_head = block.is_attention and tuple(parameter.shape) == (shape.head_dim,)
    return not _is_listed(name) and (is_of_head or tuple(parameter.shape) in ((), (1,)))


def _is_by_head(name: str, parameter: nn.Parameter, block: TPBlock, shape: AttentionShape) -> bool:
    """True if a parameter has one row for each head: [heads, head_dim] or [kv_heads, head_dim]."""
    by_head = ((shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim))
    return not _is_listed(name) and block.is_attention and tuple(parameter.shape) in by_head


def _is_listed(name: str) -> bool:
    """True if a parameter is in a list of modules, such as one norm a head. A rank would use those of other heads."""
    return any(part.isdigit() for part in name.split("."))


def _output_dim(matrix: nn.Module) -> int:
    """The dimension of a weight with the outputs: 0 in torch's Linear, [outputs, inputs]; 1 in the Conv1D of GPT-2."""
    return 0 if isinstance(matrix, nn.Linear) else 1


def splittable_decoder(model: nn.Module) -> SplittableDecoder:
    """The decoder of a model, with the blocks of its layers.

    Raises:
        PlanError: its family has no blocks, or its modules are not those that the blocks speak of.
    """
    parts = split_into_parts(model)
    name = type(parts.causal).__name__
    config = text_config(parts.causal)
    if config is not parts.causal.config:
        raise PlanError(f"{name} is more than a language model ({parts.causal.config.model_type!r}): {_REMEDY}")
    blocks = tp_blocks(config)
    if isinstance(blocks, str):
        raise PlanError(f"{name}: {blocks}; {_REMEDY}")
    family = FAMILIES[str(config.model_type)]
    for index, layer in enumerate(parts.layers):
        own = tuple(block for block in blocks if not block.only_some_layers or has_matrix(layer, block.row))
        missing = [matrix for matrix in _matrix_names(own) if not has_matrix(layer, matrix)]
        if missing:
            raise PlanError(f"{name}: layer {index} has no matrix {missing[0]!r}: {_REMEDY}")
    embedding, head = parts.causal.get_input_embeddings(), parts.causal.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or embedding.max_norm is not None:
        raise PlanError(f"{name} has no plain torch.nn.Embedding and torch.nn.Linear for its vocabulary: {_REMEDY}")
    if embedding.num_embeddings != head.out_features:
        sizes = f"{embedding.num_embeddings} and {head.out_features}"
        raise PlanError(
            f"{name}: its token embedding and its output layer have {sizes} rows: give them the same number"
        )
    norms = [slot.module for slot in parts.post_layers if re.search("norm|ln_f", slot.key)]
    if len(norms) > 1:
        raise PlanError(f"{name} has {len(norms)} norms after its layers: {_REMEDY}")
    last = norms[0] if norms else parts.layers[-1]
    return SplittableDecoder(
        parts, config, embedding, head, last, blocks, family.experts, family.whole, attention_shape(config)
    )


def _matrix_names(blocks: tuple[TPBlock, ...]) -> Iterator[str]:
    for block in blocks:
        yield from block.columns
        yield block.row


def has_matrix(layer: nn.Module, name: str) -> bool:
    """True if a layer has a matrix, in an adapter or not."""
    try:
        return is_matrix(base_matrix(layer.get_submodule(name)))
    except AttributeError:
        return False
