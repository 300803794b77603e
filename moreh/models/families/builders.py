"""The architecture of a model from its Hugging Face configuration, for the families that are known here.

It needs neither torch nor transformers, whose import takes seconds. The names and the order of the matrices, and which of
them are fused, are those of the modules in transformers: q, k and v are three matrices in Llama and one in GPT-2.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from moreh.errors import PlanError
from moreh.models.architecture import Architecture, DecoderLayer, Linear
from moreh.models.describe.hf_config import HFConfig, read_hf_config

# Parameters and the tensors they are in.
Count = tuple[int, int]


def architecture_from_config(config: Mapping[str, Any], name: str) -> Architecture:
    """The architecture of the model that transformers' AutoModelForCausalLM builds from `config`.

    `config` is the content of a config.json; what it leaves out has the default of transformers. `name` is for messages.
    Raises PlanError for a family (`model_type`) that is not in FAMILIES and for values that cannot be meant.
    """
    family = model_type(config, name)
    if family not in FAMILIES:
        raise PlanError(f"{name}: model_type is {family!r}: give one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[family](read_hf_config(config, name))


def model_type(config: Mapping[str, Any], name: str) -> str:
    """The family of a configuration. Raises PlanError where there is none."""
    if "model_type" not in config:
        raise PlanError(
            f'{name}: there is no model_type: add it, such as "model_type": "llama", as in a config.json of Hugging Face'
        )
    family = config["model_type"]
    if not isinstance(family, str) or not family:
        raise PlanError(f'{name}: model_type is {family!r}: give the name of a family, such as "llama"')
    return family


def _norms(count: int, size: int, kind: Literal["rms", "layer"]) -> Count:
    """`count` norms of `size` elements: a layer norm has weights and biases, an RMS norm weights."""
    tensors = count * (2 if kind == "layer" else 1)
    return tensors * size, tensors


def _separate_projections(
    s: HFConfig, bias: bool, order: str = "qkv", output: str = "self_attn.o_proj"
) -> tuple[Linear, ...]:
    """Attention with a matrix each for queries, keys, values and the output."""
    widths = {"q": s.heads * s.head_dim, "k": s.kv_heads * s.head_dim, "v": s.kv_heads * s.head_dim}
    module = output.rpartition(".")[0]
    inputs = tuple(Linear(f"{module}.{part}_proj", s.hidden, widths[part], "column", bias) for part in order)
    return (*inputs, Linear(output, widths["q"], s.hidden, "row", bias))


def _two_matrices(s: HFConfig, first: str, second: str, bias: bool = True) -> tuple[Linear, Linear]:
    """A feed-forward network without a gate."""
    return Linear(first, s.hidden, s.inner, "column", bias), Linear(second, s.inner, s.hidden, "row", bias)


def _gated_network(s: HFConfig, bias: bool = False) -> tuple[Linear, ...]:
    """A feed-forward network with a gate."""
    gate = Linear("mlp.gate_proj", s.hidden, s.inner, "column", bias)
    return gate, replace(gate, name="mlp.up_proj"), Linear("mlp.down_proj", s.inner, s.hidden, "row", bias)


def _decoder(
    s: HFConfig,
    linears: Iterable[Linear],
    others: Count,
    final: Count,
    *,
    norm: Literal["rms", "layer"],
    gated: bool = False,
    rotary: bool = True,
    table: Count = (0, 0),
    windows: list[int | None] | None = None,
    **rest: Any,
) -> Architecture:
    """The architecture of layers that differ in their attention windows only."""
    layer = DecoderLayer(s.heads, s.kv_heads, s.head_dim, tuple(linears), *others)
    kinds = {window: replace(layer, window=window) for window in set(windows or [None])}
    return Architecture(
        name=s.name,
        family=s.family,
        hidden=s.hidden,
        vocabulary=s.size("vocab_size"),
        layers=tuple(kinds[window] for window in windows or [None] * s.layers),
        tied=s.flag("tie_word_embeddings"),
        gated=gated,
        norm=norm,
        rotary=rotary,
        dropout=s.has_dropout,
        table_parameters=table[0],
        table_tensors=table[1],
        final_parameters=final[0],
        final_tensors=final[1],
        max_positions=s.optional_size("max_position_embeddings"),
        **rest,
    )


def _rms_decoder(
    s: HFConfig,
    linears: Iterable[Linear],
    *,
    norms: int = 2,
    more: Count = (0, 0),
    windows: list[int | None] | None = None,
) -> Architecture:
    """What follows Llama: RMS norms, rotary positions, a gated feed-forward network."""
    parameters, tensors = _norms(norms, s.hidden, "rms")
    others = parameters + more[0], tensors + more[1]
    return _decoder(s, linears, others, _norms(1, s.hidden, "rms"), norm="rms", gated=True, windows=windows)


def _gpt2(s: HFConfig) -> Architecture:
    if s.flag("add_cross_attention"):
        raise s.refuse("add_cross_attention", "false: a model with an encoder cannot be planned")
    hidden = s.hidden
    linears = (
        Linear("attn.c_attn", hidden, 3 * hidden, "column", bias=True),
        Linear("attn.c_proj", hidden, hidden, "row", bias=True),
        *_two_matrices(s, "mlp.c_fc", "mlp.c_proj"),
    )
    table = s.size("max_position_embeddings") * hidden, 1
    norms = _norms(2, hidden, "layer"), _norms(1, hidden, "layer")
    return _decoder(s, linears, *norms, norm="layer", rotary=False, table=table)


def _gptj(s: HFConfig) -> Architecture:
    attention = _separate_projections(s, bias=False, order="kvq", output="attn.out_proj")
    norms = _norms(1, s.hidden, "layer"), _norms(1, s.hidden, "layer")
    return _decoder(s, attention + _two_matrices(s, "mlp.fc_in", "mlp.fc_out"), *norms, norm="layer", head_bias=True)


def _gpt_neox(s: HFConfig) -> Architecture:
    linears = _fused_projections(s, "attention", 3 * s.hidden, s.flag("attention_bias"))
    linears += _two_matrices(s, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    return _decoder(s, linears, _norms(2, s.hidden, "layer"), _norms(1, s.hidden, "layer"), norm="layer")


def _fused_projections(s: HFConfig, module: str, outputs: int, bias: bool) -> tuple[Linear, ...]:
    """Attention with one matrix for queries, keys and values together, and one for the output."""
    fused = Linear(f"{module}.query_key_value", s.hidden, outputs, "column", bias)
    return fused, Linear(f"{module}.dense", s.hidden, s.hidden, "row", bias)


def _bloom(s: HFConfig) -> Architecture:
    linears = _fused_projections(s, "self_attention", 3 * s.hidden, bias=True)
    linears += _two_matrices(s, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    embedding_norm = _norms(1, s.hidden, "layer")
    norms = _norms(2, s.hidden, "layer"), _norms(1, s.hidden, "layer")
    return _decoder(s, linears, *norms, norm="layer", rotary=False, table=embedding_norm)


def _falcon(s: HFConfig) -> Architecture:
    newer = s.flag("new_decoder_architecture")
    if not newer:
        # The older ones have one key-value head or as many as query heads, whatever the file says.
        s = replace(s, values={**s.values, "num_key_value_heads": 1 if s.flag("multi_query") else None})
    bias = s.flag("bias")
    linears = _fused_projections(s, "self_attention", (s.heads + 2 * s.kv_heads) * s.head_dim, bias)
    linears += _two_matrices(s, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias)
    given = s.optional_size("num_ln_in_parallel_attn")
    two_norms = not s.flag("parallel_attn") or given == 2 or (given is None and newer)
    norms = _norms(2 if two_norms else 1, s.hidden, "layer"), _norms(1, s.hidden, "layer")
    return _decoder(s, linears, *norms, norm="layer", rotary=not s.flag("alibi"))


def _opt(s: HFConfig) -> Architecture:
    bias, hidden = s.flag("enable_bias"), s.hidden
    linears = _separate_projections(s, bias, order="kvq", output="self_attn.out_proj")
    linears += _two_matrices(s, "fc1", "fc2", bias)
    norm = _norms(1, hidden, "layer") if s.flag("layer_norm_elementwise_affine") else (0, 0)
    final = norm if s.flag("do_layer_norm_before") and not s.flag("_remove_final_layer_norm") else (0, 0)
    # Positions count from 2.
    table = (s.size("max_position_embeddings") + 2) * hidden, 1
    width = s.optional_size("word_embed_proj_dim") or hidden
    if width != hidden:
        table, final = (table[0] + width * hidden, 2), (final[0] + width * hidden, final[1] + 1)
    others = 2 * norm[0], 2 * norm[1]
    embedding_dim = 0 if width == hidden else width
    return _decoder(s, linears, others, final, norm="layer", rotary=False, table=table, embedding_dim=embedding_dim)


def _phi(s: HFConfig) -> Architecture:
    linears = _separate_projections(s, bias=True, output="self_attn.dense")
    linears += _two_matrices(s, "mlp.fc1", "mlp.fc2")
    parameters, tensors = _norms(1, s.hidden, "layer")
    if s.flag("qk_layernorm"):
        parameters, tensors = parameters + 4 * s.even_head_dim, tensors + 4
    return _decoder(s, linears, (parameters, tensors), _norms(1, s.hidden, "layer"), norm="layer", head_bias=True)


def _starcoder2(s: HFConfig) -> Architecture:
    bias = s.flag("use_bias")
    linears = _separate_projections(s, bias) + _two_matrices(s, "mlp.c_fc", "mlp.c_proj", bias)
    norms = _norms(2, s.hidden, "layer"), _norms(1, s.hidden, "layer")
    return _decoder(s, linears, *norms, norm="layer", windows=s.windows((True,) * s.layers))


def _llama(s: HFConfig) -> Architecture:
    return _rms_decoder(s, _separate_projections(s, s.flag("attention_bias")) + _gated_network(s, s.flag("mlp_bias")))


def _mistral(s: HFConfig) -> Architecture:
    return _rms_decoder(s, _separate_projections(s, False) + _gated_network(s), windows=s.windows((True,) * s.layers))


def _mixtral(s: HFConfig) -> Architecture:
    experts, active = s.size("num_local_experts"), s.size("num_experts_per_tok")
    if active > experts:
        raise s.refuse("num_experts_per_tok", f"at most the {experts} experts of num_local_experts")
    router = Linear("mlp.gate", s.hidden, experts, "none")
    up = Linear(
        "mlp.experts.gate_up_proj", s.hidden, 2 * s.inner, "column", copies=experts, active=active, stacked=True
    )
    down = replace(up, name="mlp.experts.down_proj", inputs=s.inner, outputs=s.hidden, split="row")
    linears = (*_separate_projections(s, False), router, up, down)
    return _rms_decoder(s, linears, windows=s.windows((True,) * s.layers))


def _qwen_windows(s: HFConfig) -> list[int | None]:
    if not s.flag("use_sliding_window"):
        return [None] * s.layers
    first = s.values["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise s.refuse("max_window_layers", "a whole number of at least 0")
    return s.windows(tuple(layer >= first for layer in range(s.layers)))


def _qwen2(s: HFConfig) -> Architecture:
    attention = _separate_projections(s, bias=True)
    output = replace(attention[-1], bias=False)
    return _rms_decoder(s, (*attention[:-1], output, *_gated_network(s)), windows=_qwen_windows(s))


def _qwen3(s: HFConfig) -> Architecture:
    linears = _separate_projections(s, s.flag("attention_bias")) + _gated_network(s)
    return _rms_decoder(s, linears, more=_norms(2, s.head_dim, "rms"), windows=_qwen_windows(s))


def _gemma(s: HFConfig) -> Architecture:
    return _rms_decoder(s, _separate_projections(s, s.flag("attention_bias")) + _gated_network(s))


def _gemma2(s: HFConfig) -> Architecture:
    windows = s.windows(tuple(layer % 2 == 0 for layer in range(s.layers)))
    return _rms_decoder(
        s, _separate_projections(s, s.flag("attention_bias")) + _gated_network(s), norms=4, windows=windows
    )


def _phi3(s: HFConfig) -> Architecture:
    linears = (
        Linear("self_attn.o_proj", s.heads * s.head_dim, s.hidden, "row"),
        Linear("self_attn.qkv_proj", s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim, "column"),
        Linear("mlp.gate_up_proj", s.hidden, 2 * s.inner, "column"),
        Linear("mlp.down_proj", s.inner, s.hidden, "row"),
    )
    return _rms_decoder(s, linears, windows=s.windows((True,) * s.layers))


FAMILIES: Mapping[str, Callable[[HFConfig], Architecture]] = {
    "bloom": _bloom,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "opt": _opt,
    "phi": _phi,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "starcoder2": _starcoder2,
}
