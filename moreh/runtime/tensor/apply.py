"""Makes a transformers model compute with one rank's part of each matrix, through hooks and head counts.

The forward code of transformers runs unchanged. At the entry of a block every rank gets the whole hidden states
[batch, sequence, hidden]. After the block's last matrix the partial results are summed. With sequence parallelism, each
rank has only its part of the sequence between blocks: [batch, sequence / ranks, hidden], from before the first layer to
after the final norm.
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
from moreh.models.families.tp_blocks import TPBlock
from moreh.models.lora import base_matrix, lora_pairs
from moreh.runtime.sharding.rng import TPRngState
from moreh.runtime.tensor.collectives import (
    copy_to_tp,
    gather_from_sp,
    reduce_from_tp,
    reduce_scatter_to_sp,
    scatter_to_sp,
)
from moreh.runtime.tensor.experts import install_experts
from moreh.runtime.tensor.partition import SplittableDecoder, splittable_decoder
from moreh.runtime.tensor.vocab_parallel import vocab_parallel_embedding

# Attributes of attention modules that count heads, over all families.
HEAD_COUNT_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_kv_heads")
_SEQUENCE_DIM = 1

# A forward pre-hook with keyword arguments: (module, args, kwargs) -> (args, kwargs).
_PreHook = Callable[[nn.Module, Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


class TensorParallelState:
    """The state that the hooks of a model share."""

    def __init__(self, group: dist.ProcessGroup, *, sequence_parallel: bool, rng: TPRngState) -> None:
        self.group = group
        """The tensor-parallel ranks."""
        self.sequence_parallel = sequence_parallel
        """True if ranks split sequences between blocks. A caller may turn it off, such as for a step of generation."""
        self.rng = rng
        """The random numbers of this rank for its own heads and its part of the sequence."""


def install_tensor_parallel(
    model: nn.Module, group: dist.ProcessGroup, *, sequence_parallel: bool
) -> TensorParallelState:
    """Let a model compute with the parts of its parameters that describe_partition gives this rank.

    Call it once, before or after the parameters are replaced by their parts: each forward pass looks them up again. The
    model's logits are then those of this rank's part of the vocabulary (vocab_parallel.py). With `sequence_parallel`
    the number of ranks must divide the length of sequences.

    Raises:
        PlanError: the model's family has no tensor-parallel blocks.
    """
    decoder = splittable_decoder(model)
    state = TensorParallelState(group, sequence_parallel=sequence_parallel, rng=TPRngState(group.rank()))
    _install_embedding(decoder, state)
    dropout = has_dropout(decoder.config, decoder.parts.layers)
    for layer in decoder.parts.layers:
        for block in decoder.blocks_of(layer):
            _install_block(layer, block, decoder, state, dropout=dropout)
        install_experts(layer, decoder.experts, group, state)
    decoder.parts.layers[0].register_forward_pre_hook(_split_sequence(state), with_kwargs=True, prepend=True)
    if dropout:
        for layer in decoder.parts.layers:
            layer.register_forward_pre_hook(_enter_layer(state))
            layer.register_forward_hook(_exit_layer(state))
    decoder.last.register_forward_hook(_gather_sequence(state))
    return state


def _install_embedding(decoder: SplittableDecoder, state: TensorParallelState) -> None:
    vocabulary_size = decoder.embedding.num_embeddings

    def forward(self: nn.Embedding, input: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_embedding(self, input, state.group, vocabulary_size)

    decoder.embedding.forward = MethodType(forward, decoder.embedding)  # type: ignore[method-assign]


def _install_block(
    layer: nn.Module, block: TPBlock, decoder: SplittableDecoder, state: TensorParallelState, *, dropout: bool
) -> None:
    entry = layer.get_submodule(block.entry)
    # A feed-forward network computes token by token, so its tokens may be in any order: it gathers and scatters along
    # the first dimension, which needs no transposition.
    dim = _SEQUENCE_DIM if block.is_attention else 0
    entry.register_forward_pre_hook(_enter_block(state, dim), with_kwargs=True)
    if block.is_attention:
        _split_heads(entry, block, decoder, state)
        if dropout:
            entry.register_forward_pre_hook(_enter_attention(state))
    for name in block.cross_rank_norms:
        norm = layer.get_submodule(name)
        norm.forward = MethodType(_cross_rank_norm_forward(state), norm)
    for name in block.columns:
        matrix = base_matrix(layer.get_submodule(name))
        if not isinstance(matrix, nn.Linear):
            matrix.register_forward_pre_hook(_count_conv1d_outputs)
    row = layer.get_submodule(block.row)
    # The adapters of a row-split matrix are split like it: the results of A are summed, B computes with the sum.
    for matrix in (base_matrix(row), *(lora_a for lora_a, _ in lora_pairs(row))):
        matrix.forward = MethodType(_row_forward(state, dim, ends_attention=block.is_attention), matrix)


def _split_heads(attention: nn.Module, block: TPBlock, decoder: SplittableDecoder, state: TensorParallelState) -> None:
    """Let an attention module count only this rank's heads, and pass it only the arguments of these heads."""
    size, rank, heads = state.group.size(), state.group.rank(), decoder.shape.heads
    for name in (*HEAD_COUNT_ATTRIBUTES, *block.head_attributes):
        count = getattr(attention, name, None)
        if isinstance(count, int):
            setattr(attention, name, count // size)
    if block.head_config_keys:
        counts = {name: getattr(decoder.config, name) // size for name in block.head_config_keys}
        attention.config = _LocalConfig(decoder.config, counts)  # type: ignore[assignment]
    if block.per_head_args:
        first, last = rank * heads // size, (rank + 1) * heads // size

        def slice_arguments(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            for name, slice_heads in block.per_head_args.items():
                if kwargs.get(name) is not None:
                    kwargs[name] = slice_heads(kwargs[name], heads, first, last)
            return args, kwargs

        attention.register_forward_pre_hook(slice_arguments, with_kwargs=True)


class _LocalConfig:
    """A model's configuration with some values as they are on this rank."""

    def __init__(self, config: Any, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._config = config

    def __getattr__(self, name: str) -> Any:
        # copy.deepcopy asks for attributes before there is a `_config`.
        if name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


def _on_hidden_states(function: Callable[[torch.Tensor], torch.Tensor]) -> _PreHook:
    """A hook that applies a function to the hidden states that a module is called with.

    They are the first positional argument or `hidden_states`. Some attentions get them again as keys and values.
    """

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        before = args[0] if args else kwargs["hidden_states"]
        after = function(before)
        args = tuple(after if value is before else value for value in args)
        return args, {key: after if value is before else value for key, value in kwargs.items()}

    return hook


def _enter_block(state: TensorParallelState, dim: int) -> _PreHook:
    def enter(hidden_states: torch.Tensor) -> torch.Tensor:
        if state.sequence_parallel:
            return gather_from_sp(hidden_states, dim, state.group)
        return copy_to_tp(hidden_states, state.group)

    return _on_hidden_states(enter)


def _row_forward(
    state: TensorParallelState, dim: int, *, ends_attention: bool
) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """A forward that sums the ranks' matmuls, each with a rank's own inputs. The bias is added once, to the sum."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if ends_attention:
            state.rng.exit_attention()
        partial = functional.linear(input, self.weight) if isinstance(self, nn.Linear) else input @ self.weight
        if state.sequence_parallel:
            out = reduce_scatter_to_sp(partial, dim, state.group)
        else:
            out = reduce_from_tp(partial, state.group)
        # Under autocast the matmul is in bfloat16, and so is the result of the module whose forward this replaces.
        return out if self.bias is None else out + self.bias.to(out.dtype)

    return forward


def _cross_rank_norm_forward(state: TensorParallelState) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """A forward of Llama's RMSNorm over the features of all ranks, of which each has a part. It computes in float32."""
    num_features: int | None = None

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        nonlocal num_features
        if num_features is None:
            # Ranks may have different numbers of features.
            count = torch.tensor(hidden_states.shape[-1], device=hidden_states.device)
            dist.all_reduce(count, group=state.group)
            num_features = int(count)
        x_fp32 = hidden_states.to(torch.float32)
        sum_of_squares = reduce_from_tp(x_fp32.pow(2).sum(-1, keepdim=True), state.group)
        # Each rank normalizes its own features with the sum, so the gradient of the sum is summed over the ranks too.
        variance = copy_to_tp(sum_of_squares, state.group) / num_features
        return (self.weight * (x_fp32 * torch.rsqrt(variance + self.variance_epsilon))).to(hidden_states.dtype)

    return forward


def _count_conv1d_outputs(module: Any, args: Any) -> None:
    """GPT-2's Conv1D takes the number of its outputs from an attribute."""
    module.nf = module.weight.shape[1]


def _split_sequence(state: TensorParallelState) -> _PreHook:
    """Split before the first layer: transformers has then computed masks and the like from whole sequences."""

    def split(hidden_states: torch.Tensor) -> torch.Tensor:
        if not state.sequence_parallel:
            return hidden_states
        length, size = hidden_states.shape[_SEQUENCE_DIM], state.group.size()
        if length % size:
            raise PlanError(
                f"sequences of {length} tokens cannot be divided among {size} tensor-parallel ranks: pad them"
            )
        return scatter_to_sp(hidden_states, _SEQUENCE_DIM, state.group)

    return _on_hidden_states(split)


def _gather_sequence(state: TensorParallelState) -> Callable[[nn.Module, Any, Any], Any]:
    """Gather after the final norm: the output layer, which is split by its outputs, needs whole hidden states."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden_states = output if isinstance(output, torch.Tensor) else output[0]
        if state.sequence_parallel:
            hidden_states = gather_from_sp(hidden_states, _SEQUENCE_DIM, state.group)
        else:
            hidden_states = copy_to_tp(hidden_states, state.group)
        return hidden_states if isinstance(output, torch.Tensor) else (hidden_states, *output[1:])

    return hook


# Dropout draws from this rank's own random numbers where the rank has activations of its own: heads without sequence
# parallelism, a part of the sequence with it. Where all ranks compute the same, they drop the same elements.


def _enter_layer(state: TensorParallelState) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        state.rng.enter_layer(module.training and state.sequence_parallel)

    return hook


def _exit_layer(state: TensorParallelState) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        state.rng.exit_layer()

    return hook


def _enter_attention(state: TensorParallelState) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        state.rng.enter_attention(module.training and not state.sequence_parallel)

    return hook
