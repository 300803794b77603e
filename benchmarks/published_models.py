"""The models of published runs, as far as a row tells: layers, widths, heads, and the shape that goes with the name."""

import re

from published_programs import RunRow, Unusable, cell, optional, required, trains_with_dropout

from moreh.models.architecture import Architecture, DecoderLayer, Linear


def architecture_of(row: RunRow) -> Architecture:
    """A GPT, or a Llama if the name says so. All published rows have one of these two shapes.

    Raises:
        Unusable: the row does not give the model's size, or gives more heads than features.
    """
    layers, hidden = required(row, "layers"), required(row, "hidden")
    name = cell(row, "model")
    is_llama = re.search(r"llama|mistral|qwen|baichuan", name.lower()) is not None
    is_mpt = re.search(r"mpt", name.lower()) is not None  # no biases, positions by ALiBi or a small table
    heads = optional(row, "heads") or max(1, hidden // 128)
    kv_heads = optional(row, "kv_heads") or heads
    inner = optional(row, "ffn") or 4 * hidden
    vocabulary = optional(row, "vocab") or 51200  # GPT-2's, padded to a multiple of 1,024 as Megatron does
    head_dim, has_bias = hidden // heads, not (is_llama or is_mpt)
    if head_dim < 1:
        raise Unusable(f"heads of size 0: hidden={hidden} < heads={heads}")
    kv_width = kv_heads * head_dim
    linears = [
        Linear("query", hidden, hidden, "column", has_bias),
        Linear("key", hidden, kv_width, "column", has_bias),
        Linear("value", hidden, kv_width, "column", has_bias),
        Linear("output", hidden, hidden, "row", has_bias),
        Linear("up", hidden, inner, "column", has_bias),
        Linear("down", inner, hidden, "row", has_bias),
    ]
    if is_llama:
        linears.append(Linear("gate", hidden, inner, "column"))
    norm = hidden * (2 if has_bias else 1)
    layer = DecoderLayer(heads, kv_heads, head_dim, tuple(linears), 2 * norm, 4 if has_bias else 2)
    positions = 0 if is_llama else (optional(row, "seq_len") or 0) * hidden
    return Architecture(
        name=name,
        family="llama" if is_llama else "gpt2",
        hidden=hidden,
        vocabulary=vocabulary,
        layers=(layer,) * layers,
        tied=not is_llama,
        gated=is_llama,
        norm="rms" if is_llama else "layer",
        rotary=is_llama,
        dropout=has_bias and trains_with_dropout(row),
        table_parameters=positions,
        table_tensors=1 if positions else 0,
        final_parameters=norm,
        final_tensors=2 if has_bias else 1,
    )
