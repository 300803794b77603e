"""Block attention in the attention layers of one transformers model, while that model computes.

The `forward` of an attention layer of transformers looks up by name which function to call:

    ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

`block_attention` is registered there under a name of its own. `use_block_attention` lets the layers of a model see
their config through a view that has this name. The config itself keeps "sdpa":
- masks are made, and rows are packed, as for torch's attention;
- other models with the same config are not affected;
- copies that a script makes meanwhile, and configs that it saves, have "sdpa".

Switching the name in the config would break families that compare it with "sdpa" themselves. Falcon would take its
eager path, which relies on a mask that is not made for "sdpa".
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from moreh.models.provenance import is_stock_transformers
from moreh.runtime.kernels.attention import causal, varlen

NAME = "moreh_block"
"""The name under which transformers knows `block_attention`."""
_SDPA = "sdpa"
# Arguments that only other attention functions of transformers support.
_EXTRA_ARGUMENTS = ("softcap", "position_bias", "cache", "s_aux")


def block_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of transformers: attention in blocks where the result is the same, else torch's ("sdpa").

    On GPUs, variable-length attention takes the place of blocks, for packed rows only.

    Packed sequences are those of `cu_seq_lens_q`, the argument through which transformers passes their boundaries to
    Flash Attention. Where `cu_seq_lens_k` counts more keys of a sequence than queries, the additional ones are the
    shared prefix.
    """
    # Without a mask a row is one sequence, even if boundaries are passed: torch's attention ignores them.
    cu_seqlens = None if attention_mask is None else kwargs.get("cu_seq_lens_q")
    hides_later_keys = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    length = query.shape[2]
    longest = max(kwargs.get("max_length_q", 0), kwargs.get("max_length_k", 0)) or length
    window = kwargs.get("sliding_window")
    is_plain = (
        hides_later_keys
        and dropout == 0.0
        and 1 < length == key.shape[2]
        and (window is None or window >= longest)
        and all(kwargs.get(name) is None for name in _EXTRA_ARGUMENTS)
    )
    if is_plain and packed_by_varlen(query.device) and cu_seqlens is not None and query.shape[0] == 1:
        scale = scaling if scaling is not None else float(query.shape[-1] ** -0.5)
        output = varlen.attend(query, key, value, cu_seqlens, longest, scale)
        if output is not None:
            return output, None
    if not (
        is_plain
        and query.device.type == "cpu"
        and longest <= causal.MAX_SEQUENCE_LENGTH
        and (attention_mask is None or _is_packed_row(cu_seqlens, query.shape[0], length))
    ):
        return ALL_ATTENTION_FUNCTIONS[_SDPA](
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    scale = scaling if scaling is not None else float(query.shape[-1] ** -0.5)
    if cu_seqlens is None:
        return causal.causal_attention(query, key, value, scale), None
    prefix_len = _shared_prefix_len(cu_seqlens, kwargs.get("cu_seq_lens_k"))
    return causal.causal_attention(query, key, value, scale, tuple(cu_seqlens.tolist()), prefix_len), None


AttentionInterface.register(NAME, block_attention)


def packed_by_varlen(device: torch.device) -> bool:
    """True if packed rows on a device are computed by variable-length attention."""
    return device.type == "cuda"


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that look up their attention function by the name in their config."""
    return [module for module in model.modules() if _looks_up_attention(module)]


@contextmanager
def use_block_attention(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let attention layers of a model compute in blocks. Layers that do not use torch's attention keep their own.

    If a script has replaced "sdpa" by a function of its own, all layers keep that function.
    """
    configs: list[tuple[nn.Module, Any]] = []
    try:
        if is_stock_transformers(ALL_ATTENTION_FUNCTIONS[_SDPA]):
            for layer in layers:
                config: Any = layer.config
                if config._attn_implementation == _SDPA:
                    configs.append((layer, config))
                    vars(layer)["config"] = _BlockAttentionConfig(config)
        yield
    finally:
        for layer, config in configs:
            vars(layer)["config"] = config


class _BlockAttentionConfig:
    """A view of a config with another attention implementation. Copies and pickles of it are of the config itself."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _identity, (self._config,)


def _identity(config: Any) -> Any:
    return config


def _looks_up_attention(module: nn.Module) -> bool:
    """True if a module's class uses the name in its config only to look up the function in transformers' interface."""
    forward: Any = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "config" not in vars(module) or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return False
    # A family may have an interface of its own, with other functions under the same names (Doge).
    if forward.__globals__.get("ALL_ATTENTION_FUNCTIONS") is not ALL_ATTENTION_FUNCTIONS:
        return False
    # Or it compares the name with "sdpa" itself, to choose another computation (DeepSeek's sparse attention).
    nested = [constant for constant in code.co_consts if isinstance(constant, tuple | frozenset)]
    return not any(_SDPA in constants for constants in (code.co_consts, *nested))


def _is_packed_row(cu_seqlens: torch.Tensor | None, batch: int, length: int) -> bool:
    """True if the boundaries are those of the sequences in one row of this length."""
    return cu_seqlens is not None and batch == 1 and int(cu_seqlens[-1]) == length


def _shared_prefix_len(cu_seqlens: torch.Tensor, cu_seqlens_k: torch.Tensor | None) -> int:
    """Number of keys minus number of queries of each sequence after the first one."""
    if cu_seqlens_k is None or len(cu_seqlens) < 3:
        return 0
    return int((cu_seqlens_k[2] - cu_seqlens_k[1]) - (cu_seqlens[2] - cu_seqlens[1]))
