"""Shared building blocks for the architectures of families.

The names and the order of the matrices, and which of them are fused, are those of the modules in transformers: q, k
and v are three matrices in Llama and one in GPT-2.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from moreh.models.architecture import Architecture, DecoderLayer, Linear
from moreh.models.families.hf_config import HFConfig

# A number of parameters, and the number of tensors that they are in.
Count = tuple[int, int]


def norms(count: int, size: int, kind: Literal["rms", "layer"]) -> Count:
    """`count` norms of `size` elements: a LayerNorm has weights and biases, an RMSNorm weights."""
    tensors = count * (2 if kind == "layer" else 1)
    return tensors * size, tensors


def separate_projections(
    config: HFConfig, bias: bool, order: str = "qkv", output: str = "self_attn.o_proj"
) -> tuple[Linear, ...]:
    """Attention with separate matrices for queries, keys and values, in this `order`, and one for the output."""
    kv_width = config.kv_heads * config.head_dim
    widths = {"q": config.heads * config.head_dim, "k": kv_width, "v": kv_width}
    module = output.rpartition(".")[0]
    inputs = tuple(Linear(f"{module}.{part}_proj", config.hidden, widths[part], "column", bias) for part in order)
    return (*inputs, Linear(output, widths["q"], config.hidden, "row", bias))


def fused_projections(config: HFConfig, module: str, outputs: int, bias: bool) -> tuple[Linear, ...]:
    """Attention with one matrix for queries, keys and values together, and one for the output."""
    fused = Linear(f"{module}.query_key_value", config.hidden, outputs, "column", bias)
    return fused, Linear(f"{module}.dense", config.hidden, config.hidden, "row", bias)


def plain_mlp(config: HFConfig, first: str, second: str, bias: bool = True) -> tuple[Linear, Linear]:
    """A feed-forward network without a gate."""
    up = Linear(first, config.hidden, config.inner, "column", bias)
    return up, Linear(second, config.inner, config.hidden, "row", bias)


def gated_mlp(config: HFConfig, bias: bool = False) -> tuple[Linear, ...]:
    """A feed-forward network with a gate."""
    gate = Linear("mlp.gate_proj", config.hidden, config.inner, "column", bias)
    down = Linear("mlp.down_proj", config.inner, config.hidden, "row", bias)
    return gate, replace(gate, name="mlp.up_proj"), down


def decoder(
    config: HFConfig,
    linears: Iterable[Linear],
    others: Count,
    final: Count,
    *,
    norm: Literal["rms", "layer"],
    gated: bool = False,
    rotary: bool = True,
    table: Count = (0, 0),
    windows: list[int | None] | None = None,
    **fields: Any,
) -> Architecture:
    """A decoder whose layers differ only in their attention windows.

    Args:
        config: The values of its configuration.
        linears: The matrices of a layer.
        others: The parameters of a layer outside its matrices.
        final: The parameters after the last layer, without the output layer.
        norm: The kind of norm.
        gated: Whether feed-forward networks have a gate.
        rotary: Whether positions are rotary embeddings.
        table: The parameters before the first layer, besides the token embedding.
        windows: The attention window of each layer; None where no layer has one.
        **fields: Further fields of Architecture.
    """
    layer = DecoderLayer(config.heads, config.kv_heads, config.head_dim, tuple(linears), *others)
    by_window = {window: replace(layer, window=window) for window in set(windows or [None])}
    return Architecture(
        name=config.name,
        family=config.family,
        hidden=config.hidden,
        vocabulary=config.size("vocab_size"),
        layers=tuple(by_window[window] for window in windows or [None] * config.layers),
        tied=config.flag("tie_word_embeddings"),
        gated=gated,
        norm=norm,
        rotary=rotary,
        dropout=config.has_dropout,
        table_parameters=table[0],
        table_tensors=table[1],
        final_parameters=final[0],
        final_tensors=final[1],
        max_positions=config.optional_size("max_position_embeddings"),
        **fields,
    )


def llama_like(
    config: HFConfig,
    linears: Iterable[Linear],
    *,
    layer_norms: int = 2,
    more: Count = (0, 0),
    windows: list[int | None] | None = None,
) -> Architecture:
    """A decoder like Llama: RMSNorm, rotary positions, gated feed-forward networks.

    A layer has `layer_norms` norms of the hidden size, and `more` parameters in addition.
    """
    parameters, tensors = norms(layer_norms, config.hidden, "rms")
    others = parameters + more[0], tensors + more[1]
    final = norms(1, config.hidden, "rms")
    return decoder(config, linears, others, final, norm="rms", gated=True, windows=windows)
