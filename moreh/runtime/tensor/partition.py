"""Which parameters of a decoder tensor-parallel ranks divide, and which models they cannot."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moreh.errors import PlanError
from moreh.models.describe.from_layer import is_matrix
from moreh.models.describe.from_module import text_config
from moreh.models.lora import base_matrix, lora_pairs
from moreh.models.parts import ModelParts, split_into_parts
from moreh.runtime.sharding.spec import TPSplit
from moreh.runtime.tensor.rules import Heads, TPBlock, tp_blocks

# How messages about models that cannot be divided end.
_REMEDY = "use tensor parallelism of size 1"


@dataclass(frozen=True)
class TensorPartition:
    """How tensor-parallel ranks divide the parameters of a model, by their names in `named_parameters()`.

    What is not in `divisions` is the same on every rank. Of `partial_gradients`, which are among those, each rank computes a
    part of the gradient only: the sum over the ranks is the whole.
    """

    divisions: dict[str, TPSplit]
    partial_gradients: frozenset[str]


@dataclass(frozen=True)
class DivisibleDecoder:
    """A decoder that there are rules for, its parameters whole or already divided.

    `last` is the last module that computes on the residual stream: the final norm, or the last layer where there is none.
    """

    parts: ModelParts
    config: Any
    embedding: nn.Embedding
    head: nn.Linear
    last: nn.Module
    regions: tuple[TPBlock, ...]
    heads: Heads


def max_tensor_parallel(model: nn.Module) -> int:
    """The largest number of ranks that can divide a model; 1 where tensor parallelism cannot be used."""
    try:
        heads = find_decoder(model).heads
    except PlanError:
        return 1
    sizes = [size for size in range(heads.key_value, 1, -1) if heads.key_value % size == heads.query % size == 0]
    return next((size for size in sizes if tensor_parallel_problem(model, size) is None), 1)


def tensor_parallel_problem(model: nn.Module, size: int) -> str | None:
    """Why `size` ranks cannot divide a model, as a sentence for the user; None if they can."""
    return _problem(model, size, sequence_parallel=False)


def sequence_parallel_refusal(model: nn.Module, size: int) -> str | None:
    """Why `size` ranks cannot divide a model together with its sequences, as a sentence for the user; None if they can."""
    return _problem(model, size, sequence_parallel=True)


def _problem(model: nn.Module, size: int, *, sequence_parallel: bool) -> str | None:
    try:
        describe_partition(model, size, sequence_parallel=sequence_parallel)
    except PlanError as problem:
        return str(problem)
    return None


def describe_partition(model: nn.Module, size: int, *, sequence_parallel: bool) -> TensorPartition:
    """How `size` ranks divide a model, from the names and shapes of its parameters: it may be on the meta device.

    Raises:
        PlanError: they cannot, for the reason that the functions above give.
    """
    decoder = find_decoder(model)
    layerdrop = getattr(decoder.config, "layerdrop", 0.0)
    if sequence_parallel and layerdrop:
        # The first layer divides the sequences.
        raise PlanError(
            f"layerdrop is {layerdrop}, which leaves layers out: use no sequence parallelism, or set it to 0"
        )
    heads = decoder.heads
    groups = max(region.head_groups for region in decoder.regions)
    divisible = {"attention heads": heads.query, "key-value heads": heads.key_value}
    if groups > 1:
        divisible = {f"attention heads in each of its {groups} groups": heads.query // groups}
    for what, count in divisible.items():
        if size < 1 or count % size:
            raise PlanError(
                f"{type(decoder.parts.causal).__name__} has {count} {what}, which {size} tensor-parallel ranks cannot divide: "
                f"use a divisor of {count}"
            )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    divisions: dict[int, TPSplit] = {}
    partial: set[int] = set()
    for layer in decoder.parts.layers:
        known: set[int] = set()
        for region in decoder.regions:
            divided, shared, summed = _divide_region(layer, region, heads, names)
            divisions |= divided
            partial |= shared
            known |= set(divided) | shared | summed
        others = [
            parameter
            for parameter in layer.parameters()
            if id(parameter) not in divisions and id(parameter) not in partial
        ]
        for parameter in others:
            if parameter.dim() > 1 and id(parameter) not in known:
                name = names[id(parameter)]
                raise PlanError(
                    f"{name} is a matrix that the tensor-parallel rules of its family do not know: {_REMEDY}"
                )
            if sequence_parallel:
                partial.add(id(parameter))
    for module in (decoder.embedding, decoder.head):
        divisions |= {id(parameter): TPSplit(0, (parameter.shape[0],)) for parameter in module.parameters()}
    for place in decoder.parts.after:
        # The output layer is divided, so that the gradients behind the last module are partial in any case.
        if sequence_parallel or place.module is not decoder.last:
            partial |= {id(parameter) for parameter in place.module.parameters()}
    partial -= set(divisions)
    return TensorPartition(
        {names[key]: division for key, division in divisions.items()}, frozenset(names[key] for key in partial)
    )


def _divide_region(
    layer: nn.Module, region: TPBlock, heads: Heads, names: dict[int, str]
) -> tuple[dict[int, TPSplit], set[int], set[int]]:
    """By identity, the parameters of a region that are divided, those that all ranks use for their own heads, and those that
    are used behind the sum: the bias of the row-divided matrix, and its adapters' B.
    """
    divisions: dict[int, TPSplit] = {}
    shared: set[int] = set()
    for name, blocks in region.columns.items():
        column = layer.get_submodule(name)
        matrix = base_matrix(column)
        dim = _output_dim(matrix)
        division = TPSplit(dim, blocks(heads, matrix.weight.shape[dim]))
        divisions |= {id(matrix.weight): division}
        if matrix.bias is not None:
            divisions |= {id(matrix.bias): TPSplit(0, division.chunk_sizes)}
        for down, up in lora_pairs(column):
            # Every rank computes all of A, but for its own outputs.
            shared.add(id(down.weight))
            divisions[id(up.weight)] = TPSplit(0, division.chunk_sizes)
    row = layer.get_submodule(region.row)
    matrix = base_matrix(row)
    dim = 1 - _output_dim(matrix)
    division = TPSplit(dim, region.row_blocks(heads, matrix.weight.shape[dim]))
    divisions[id(matrix.weight)] = division
    summed = {id(matrix.bias)} if matrix.bias is not None else set()
    for down, up in lora_pairs(row):
        divisions[id(down.weight)] = TPSplit(1, division.chunk_sizes)
        summed.add(id(up.weight))
    for name in region.cross_head_norms:
        weight = layer.get_parameter(f"{name}.weight")
        divisions[id(weight)] = TPSplit(0, (weight.shape[0],))
    for name, parameter in layer.get_submodule(region.entry).named_parameters():
        shape = tuple(parameter.shape)
        if id(parameter) in divisions or id(parameter) in shared | summed:
            continue
        # A norm for each head in a list would be used for other heads than its own.
        listed = any(part.isdigit() for part in name.split("."))
        if not listed and ((region.attention and shape == (heads.size,)) or shape in ((), (1,))):
            shared.add(id(parameter))
        elif (
            not listed
            and region.attention
            and len(shape) == 2
            and shape in ((heads.query, heads.size), (heads.key_value, heads.size))
        ):
            divisions[id(parameter)] = TPSplit(0, shape[:1])
        else:
            raise PlanError(
                f"{names[id(parameter)]} {list(shape)} belongs to all attention heads or inner features together, of which a "
                f"tensor-parallel rank has only a part: {_REMEDY}"
            )
    return divisions, shared, summed


def _output_dim(matrix: nn.Module) -> int:
    """Where the outputs are in a weight: torch's Linear is [outputs, inputs], the Conv1D of GPT-2 transposed."""
    return 0 if isinstance(matrix, nn.Linear) else 1


def find_decoder(model: nn.Module) -> DivisibleDecoder:
    """The parts of a decoder.

    Raises:
        PlanError: there are no rules for it.
    """
    parts = split_into_parts(model)
    name = type(parts.causal).__name__
    config = text_config(parts.causal)
    if config is not parts.causal.config:
        raise PlanError(f"{name} is more than a language model ({parts.causal.config.model_type!r}): {_REMEDY}")
    regions = tp_blocks(config)
    if isinstance(regions, str):
        raise PlanError(f"{name}: {regions}; {_REMEDY}")
    for number, layer in enumerate(parts.layers):
        unknown = [matrix for matrix in _matrices(regions) if not _is_matrix_of(layer, matrix)]
        if unknown:
            raise PlanError(f"{name}: layer {number} has no matrix {unknown[0]!r}: {_REMEDY}")
    embedding, head = parts.causal.get_input_embeddings(), parts.causal.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or embedding.max_norm is not None:
        raise PlanError(f"{name} has no plain torch.nn.Embedding and torch.nn.Linear for its vocabulary: {_REMEDY}")
    if embedding.num_embeddings != head.out_features:
        sizes = f"{embedding.num_embeddings} and {head.out_features}"
        raise PlanError(
            f"{name}: its token embedding and its output layer have {sizes} rows: give them the same number"
        )
    norms = [place.module for place in parts.after if re.search("norm|ln_f", place.key)]
    if len(norms) > 1:
        raise PlanError(f"{name} has {len(norms)} norms behind its layers: {_REMEDY}")
    last = norms[0] if norms else parts.layers[-1]
    return DivisibleDecoder(parts, config, embedding, head, last, regions, _heads(config))


def _matrices(regions: tuple[TPBlock, ...]) -> Iterator[str]:
    for region in regions:
        yield from region.columns
        yield region.row


def _is_matrix_of(layer: nn.Module, name: str) -> bool:
    try:
        return is_matrix(base_matrix(layer.get_submodule(name)))
    except AttributeError:
        return False


def _heads(config: Any) -> Heads:
    query = int(config.num_attention_heads)
    key_value = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or query
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        # The older ones of Falcon have one, whatever the configuration says.
        key_value = 1
    return Heads(query, int(key_value), int(getattr(config, "head_dim", None) or config.hidden_size // query))
