"""A model of transformers made to compute with its rank's part of each matrix: hooks and head counts, no code of its own.

The forward code of transformers runs unchanged. At the entry of a region every rank gets the whole hidden states, behind its
last matrix the partial results are summed. With sequence parallelism, between the regions each rank has its part of the
sequence [batch, sequence / ranks, hidden] from before the first layer until behind the final norm.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from moreh.errors import PlanError
from moreh.models.dropout import has_dropout
from moreh.models.lora import base_matrix, lora_pairs
from moreh.runtime.sharding.rng import TPRngState
from moreh.runtime.tensor.collectives import (
    copy_to_tp,
    gather_from_sp,
    reduce_from_tp,
    reduce_scatter_to_sp,
    scatter_to_sp,
)
from moreh.runtime.tensor.partition import (
    DivisibleDecoder,
    TensorPartition,
    describe_partition,
    find_decoder,
    max_tensor_parallel,
    sequence_parallel_refusal,
    tensor_parallel_problem,
)
from moreh.runtime.tensor.rules import HEAD_COUNTS, TPBlock
from moreh.runtime.tensor.vocab_parallel import vocab_parallel_embedding

__all__ = [
    "TensorParallelState",
    "TensorPartition",
    "describe_partition",
    "install_tensor_parallel",
    "max_tensor_parallel",
    "sequence_parallel_refusal",
    "tensor_parallel_problem",
]

_SEQUENCE_DIM = 1


class TensorParallelState:
    """What the hooks of a model share. `sequence_parallel` may be turned off for a call, such as one step of generation."""

    def __init__(self, group: dist.ProcessGroup, *, sequence_parallel: bool, random: TPRngState) -> None:
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.random = random


def install_tensor_parallel(
    model: nn.Module, group: dist.ProcessGroup, *, sequence_parallel: bool
) -> TensorParallelState:
    """Let a model compute with the parts of its parameters that describe_partition gives this rank.

    Called once, after or before the parameters have been replaced by their parts; they are read at each call. With
    `sequence_parallel` the length of sequences must be divisible by the ranks. The logits are those of the rank's part of the
    vocabulary (`vocabulary.vocab_parallel_cross_entropy`, `vocabulary.gather_logits`).

    Raises:
        PlanError: the family has no rules.
    """
    decoder = find_decoder(model)
    random = TPRngState(group.rank())
    state = TensorParallelState(group, sequence_parallel=sequence_parallel, random=random)
    _install_embedding(decoder, state)
    dropout = has_dropout(decoder.config, decoder.parts.layers)
    for layer in decoder.parts.layers:
        for region in decoder.regions:
            _install_region(layer, region, decoder, state, dropout=dropout)
    decoder.parts.layers[0].register_forward_pre_hook(_own_sequence(state), with_kwargs=True, prepend=True)
    if dropout:
        for layer in decoder.parts.layers:
            layer.register_forward_pre_hook(_begin_layer(state))
            layer.register_forward_hook(_end_layer(state))
    decoder.last.register_forward_hook(_whole_sequence(state))
    return state


def _install_embedding(decoder: DivisibleDecoder, state: TensorParallelState) -> None:
    vocabulary_size = decoder.embedding.num_embeddings

    def forward(self: nn.Embedding, input: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_embedding(self, input, state.group, vocabulary_size)

    decoder.embedding.forward = MethodType(forward, decoder.embedding)  # type: ignore[method-assign]


def _install_region(
    layer: nn.Module, region: TPBlock, decoder: DivisibleDecoder, state: TensorParallelState, *, dropout: bool
) -> None:
    entry = layer.get_submodule(region.entry)
    # What is computed token by token may have its tokens in any order: parts of the first dimension need no transposition.
    dim = _SEQUENCE_DIM if region.attention else 0
    entry.register_forward_pre_hook(_enter(state, dim), with_kwargs=True)
    if region.attention:
        _divide_heads(entry, region, decoder, state)
        if dropout:
            entry.register_forward_pre_hook(_begin_heads(state))
    for name in region.cross_head_norms:
        norm = layer.get_submodule(name)
        norm.forward = MethodType(_wide_norm_forward(state), norm)
    for name in region.columns:
        matrix = base_matrix(layer.get_submodule(name))
        if not isinstance(matrix, nn.Linear):
            # The Conv1D of GPT-2 counts its outputs.
            matrix.register_forward_pre_hook(_count_outputs)
    row = layer.get_submodule(region.row)
    # Adapters around the matrix are divided as it is: A's results are summed, B computes with the sum.
    for matrix in (base_matrix(row), *(down for down, _ in lora_pairs(row))):
        matrix.forward = MethodType(_row_forward(state, dim, ends_heads=region.attention), matrix)


def _divide_heads(attention: nn.Module, region: TPBlock, decoder: DivisibleDecoder, state: TensorParallelState) -> None:
    """Let an attention module count this rank's heads, and give it the arguments for them."""
    size, heads = state.group.size(), decoder.heads.query
    for name in (*HEAD_COUNTS, *region.head_attributes):
        count = getattr(attention, name, None)
        if isinstance(count, int):
            setattr(attention, name, count // size)
    if region.local_settings:
        settings = {name: getattr(decoder.config, name) // size for name in region.local_settings}
        attention.config = _LocalConfig(decoder.config, settings)  # type: ignore[assignment]
    if region.per_head_args:
        first, last = state.group.rank() * heads // size, (state.group.rank() + 1) * heads // size

        def slice_arguments(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            for name, of_heads in region.per_head_args.items():
                if kwargs.get(name) is not None:
                    kwargs[name] = of_heads(kwargs[name], heads, first, last)
            return args, kwargs

        attention.register_forward_pre_hook(slice_arguments, with_kwargs=True)


class _LocalConfig:
    """A configuration of which an attention module sees some settings as they are on its rank."""

    def __init__(self, config: Any, settings: dict[str, Any]) -> None:
        self.__dict__.update(settings)
        self._whole = config

    def __getattr__(self, name: str) -> Any:
        # Copying asks before there is a __dict__.
        if name == "_whole":
            raise AttributeError(name)
        return getattr(self._whole, name)


_PreHook = Callable[[nn.Module, Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


def _on_hidden_states(change: Callable[[torch.Tensor], torch.Tensor]) -> _PreHook:
    """A hook that changes the hidden states that a module is called with."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook


def _enter(state: TensorParallelState, dim: int) -> _PreHook:
    def enter(hidden: torch.Tensor) -> torch.Tensor:
        return gather_from_sp(hidden, dim, state.group) if state.sequence_parallel else copy_to_tp(hidden, state.group)

    return _on_hidden_states(enter)


def _row_forward(
    state: TensorParallelState, dim: int, *, ends_heads: bool
) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """The product with this rank's inputs, summed over the ranks; the bias is added once, to the sum."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if ends_heads:
            state.random.exit_attention()
        partial = functional.linear(input, self.weight) if isinstance(self, nn.Linear) else input @ self.weight
        output = (
            reduce_scatter_to_sp(partial, dim, state.group)
            if state.sequence_parallel
            else reduce_from_tp(partial, state.group)
        )
        # Under autocast the product is in low precision, and so is the result of the matrix that this stands for.
        return output if self.bias is None else output + self.bias.to(output.dtype)

    return forward


def _wide_norm_forward(state: TensorParallelState) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """An RMS norm over the features of all ranks, in float32 as in transformers, of which each rank has a part."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = hidden_states.to(torch.float32)
        own = hidden.pow(2).mean(-1, keepdim=True) / state.group.size()
        # Each rank uses the sum for its own features: the gradients of these uses are summed in turn.
        variance = copy_to_tp(reduce_from_tp(own, state.group), state.group)
        return (self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))).to(hidden_states.dtype)

    return forward


def _count_outputs(module: Any, args: Any) -> None:
    module.nf = module.weight.shape[1]


def _own_sequence(state: TensorParallelState) -> _PreHook:
    """Before the first layer: everything that transformers makes for whole sequences is made."""

    def split(hidden: torch.Tensor) -> torch.Tensor:
        if not state.sequence_parallel:
            return hidden
        length, size = hidden.shape[_SEQUENCE_DIM], state.group.size()
        if length % size:
            raise PlanError(
                f"sequences of {length} tokens cannot be divided among {size} tensor-parallel ranks: pad them"
            )
        return scatter_to_sp(hidden, _SEQUENCE_DIM, state.group)

    return _on_hidden_states(split)


def _whole_sequence(state: TensorParallelState) -> Callable[[nn.Module, Any, Any], Any]:
    """Behind the final norm: what follows is the divided output layer, whose gradients are partial."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if state.sequence_parallel:
            hidden = gather_from_sp(hidden, _SEQUENCE_DIM, state.group)
        else:
            hidden = copy_to_tp(hidden, state.group)
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    return hook


def _begin_layer(state: TensorParallelState) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        state.random.enter_layer(module.training and state.sequence_parallel)

    return hook


def _end_layer(state: TensorParallelState) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        state.random.exit_layer()

    return hook


def _begin_heads(state: TensorParallelState) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        state.random.enter_attention(module.training and not state.sequence_parallel)

    return hook
