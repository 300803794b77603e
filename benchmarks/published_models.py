"""The models of published runs, as far as a row tells: layers, widths, heads, and the shape that goes with the name."""

import re

from published_programs import RunRow, Unusable, cell, measurement, optional, required, trains_with_dropout

from moreh.models.architecture import Architecture, DecoderLayer, Linear

# Names of models with a gated network, rotary positions and RMS norms; of models without a gate; and of those of the
# first kind whose output layer has the embedding's weights.
_LLAMAS = r"llama|mistral|ministral|qwen|baichuan|gemma|\byi\b|yi-|deepseek|internlm|phi.?3|phi.?4|olmo|smollm|granite"
_GPTS = r"gpt|\bmpt|\bopt\b|opt-|bloom|pythia|neox|megatron|turing|falcon|nemotron|bert|galactica|cerebras"
_TIED = r"llama.?3\.2.*\b[13]b|qwen.?2\.?5?.*\b(0\.5|1\.5|3)b|qwen.?3.*\b(0\.6|1\.7|4)b|gemma|smollm"


def architecture_of(row: RunRow) -> Architecture:
    """A GPT, or a Llama if the name says so. All published rows have one of these two shapes.

    Raises:
        Unusable: the row does not give the model's size, or gives more heads than features.
    """
    layers, hidden = required(row, "layers"), required(row, "hidden")
    name = cell(row, "model")
    heads = optional(row, "heads") or max(1, hidden // 128)
    kv_heads = optional(row, "kv_heads") or heads
    vocabulary = optional(row, "vocab") or 51200  # GPT-2's, padded to a multiple of 1,024 as Megatron does
    is_llama = _is_llama(row, layers, hidden, kv_heads / heads, vocabulary)
    is_mpt = re.search(r"mpt", name.lower()) is not None  # no biases, positions by ALiBi or a small table
    inner = optional(row, "ffn") or _usual_inner(hidden, is_llama)
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
        tied=not is_llama or re.search(_TIED, name.lower()) is not None,
        gated=is_llama,
        norm="rms" if is_llama else "layer",
        rotary=is_llama,
        dropout=has_bias and trains_with_dropout(row),
        table_parameters=positions,
        table_tensors=1 if positions else 0,
        final_parameters=norm,
        final_tensors=2 if has_bias else 1,
    )


def _usual_inner(hidden: int, is_llama: bool) -> int:
    """The inner width of a feed-forward network of which a row does not say it: a gated one has a matrix more."""
    return -(-8 * hidden // (3 * 256)) * 256 if is_llama else 4 * hidden


def _is_llama(row: RunRow, layers: int, hidden: int, kv_share: float, vocabulary: int) -> bool:
    """True if a model has Llama's shape: by its name, else by its number of parameters, else not."""
    name = cell(row, "model").lower()
    if re.search(_LLAMAS, name):
        return True
    billions = measurement(row, "params_b")
    if re.search(_GPTS, name) or billions is None:
        return False

    def distance(is_llama: bool) -> float:
        inner = optional(row, "ffn") or _usual_inner(hidden, is_llama)
        layer = hidden * (2 * hidden * (1 + kv_share) + inner * (3 if is_llama else 2))
        return abs(layers * layer + hidden * vocabulary * (2 if is_llama else 1) - billions * 1e9)

    return distance(True) < distance(False)
