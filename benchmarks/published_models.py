"""The models of published runs, as far as a row tells them: layers, widths, heads, and the shape that goes with the name."""

import re

from published_programs import Row, Unusable, cell, optional, required

from moreh.models.architecture import Architecture, DecoderLayer, Linear


def architecture_of(row: Row) -> Architecture:
    """A GPT, or a Llama where the name says so: the two shapes that all published rows have.

    Raises:
        Unusable: the row lacks its size, or has more heads than features.
    """
    layers, hidden = required(row, "layers"), required(row, "hidden")
    name = cell(row, "model")
    llama = re.search(r"llama|mistral|qwen|baichuan", name.lower()) is not None
    bare = re.search(r"mpt", name.lower()) is not None  # no biases, positions by ALiBi or a small table
    heads = optional(row, "heads") or max(1, hidden // 128)
    kv_heads = optional(row, "kv_heads") or heads
    inner = optional(row, "ffn") or 4 * hidden
    vocabulary = optional(row, "vocab") or 51200  # GPT-2's, padded to a multiple of 1,024 as Megatron does
    size, bias = hidden // heads, not (llama or bare)
    if size < 1:
        raise Unusable(f"heads of size 0: hidden={hidden} < heads={heads}")
    keys = kv_heads * size
    linears = [
        Linear("query", hidden, hidden, "column", bias),
        Linear("key", hidden, keys, "column", bias),
        Linear("value", hidden, keys, "column", bias),
        Linear("output", hidden, hidden, "row", bias),
        Linear("up", hidden, inner, "column", bias),
        Linear("down", inner, hidden, "row", bias),
    ]
    if llama:
        linears.append(Linear("gate", hidden, inner, "column"))
    norm = hidden * (2 if bias else 1)
    layer = DecoderLayer(heads, kv_heads, size, tuple(linears), 2 * norm, 4 if bias else 2)
    positions = 0 if llama else (optional(row, "seq_len") or 0) * hidden
    return Architecture(
        name=name,
        family="llama" if llama else "gpt2",
        hidden=hidden,
        vocabulary=vocabulary,
        layers=(layer,) * layers,
        tied=not llama,
        gated=llama,
        norm="rms" if llama else "layer",
        rotary=llama,
        dropout=bias,
        table_parameters=positions,
        table_tensors=1 if positions else 0,
        final_parameters=norm,
        final_tensors=2 if bias else 1,
    )
