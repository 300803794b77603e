"""Attention over the sequences of a packed row on GPUs: torch's `varlen_attn`, or the function of flash-attn.

Both take half precision only. A function is used for a shape of heads after it has given the results and gradients of
torch's own attention for a few short sequences; one that has not, or that this GPU does not support, is left aside.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from moreh.log import logger

# (query, key, value, boundaries, longest sequence, scale) -> output. Query and output are [tokens, heads, head_dim],
# key and value [tokens, kv_heads, head_dim], the boundaries int32 [sequences + 1].
Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float], torch.Tensor]
_HALF = (torch.bfloat16, torch.float16)
# Lengths of the sequences of the check, and the tolerance of half precision.
_PROOF_LENGTHS = (5, 17, 42)
_PROOF_TOLERANCE = 2e-2
# Device types on which a proof has failed.
_REFUSED: set[str] = set()
# An attribute of boundaries that this package has made.
_TRUSTED = "_moreh_row_boundaries"


def is_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """True if packed rows can be computed on a device, by a model whose weights have a dtype, in this context."""
    computes_in = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
    return computes_in in _HALF and device.type not in _REFUSED and varlen_function(device.type) is not None


@functools.cache
def varlen_function(device_type: str) -> Varlen | None:
    """The function for a type of device; None for CPUs, and where no package has one."""
    if device_type != "cuda":  # ROCm's GPUs are called so too
        return None
    for find in (_of_torch, _of_flash_attention):
        function = find()
        if function is not None:
            return function
    return None


def trust(cu_seqlens: torch.Tensor) -> None:
    """Say of boundaries that they are those of a row: to look at them on a GPU would wait for it."""
    setattr(cu_seqlens, _TRUSTED, True)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, scale: float
) -> torch.Tensor | None:
    """Causal attention within each sequence of a row; None where no function can compute it.

    Args:
        query: `[1, heads, tokens, head_dim]`.
        key: `[1, kv_heads, tokens, head_dim]`.
        value: As `key`.
        cu_seqlens: The boundaries of the sequences, int32 `[sequences + 1]`, on the same device; marked by `trust`.
        longest: The tokens of the longest sequence.
        scale: The factor of the scores.

    Returns:
        `[1, tokens, heads, head_dim]`; under autocast in autocast's dtype.
    """
    device_type = query.device.type
    function = varlen_function(device_type)
    if function is None or query.shape[-1] != value.shape[-1] or not hasattr(cu_seqlens, _TRUSTED):
        return None
    if torch.is_autocast_enabled(device_type):
        # Rotary embeddings leave queries and keys in float32.
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not _is_proven(function, query.device, query.dtype, query.shape[1], key.shape[1], query.shape[-1]):
        return None
    with torch.autocast(device_type, enabled=False):
        query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        return function(query, key, value, cu_seqlens, longest, scale).unsqueeze(0)


@functools.cache
def _is_proven(
    function: Varlen, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> bool:
    """True if the function gives the results of torch's attention for these heads."""
    try:
        error = proof_error(function, device, dtype, heads, kv_heads, head_dim)
        reason = "" if error <= _PROOF_TOLERANCE else f"its result differs by {error:.1e}"
    except Exception as refused:  # by the kernel, in types that no documentation names
        reason = f"{type(refused).__name__}: {' '.join(str(refused).split())[:200]}"
    if reason:
        _REFUSED.add(device.type)
        logger.info("Sequences are not packed here: variable-length attention was tried, and %s.", reason)
    return not reason


def proof_error(
    function: Varlen, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> float:
    """The largest relative error of the output and of the gradients, against torch's attention in float32."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, *_PROOF_LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens, scale = int(bounds[-1]), head_dim**-0.5

    def tensor(own_heads: int) -> torch.Tensor:
        return torch.randn(tokens, own_heads, head_dim, generator=generator).to(device, dtype)

    inputs, weights = [tensor(heads), tensor(kv_heads), tensor(kv_heads)], tensor(heads).float()
    results = []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for exact in (False, True):
            leaves = [each.to(torch.float32 if exact else dtype).detach().requires_grad_() for each in inputs]
            if exact:
                output = _one_by_one(leaves, bounds.tolist(), scale)
            else:
                output = function(leaves[0], leaves[1], leaves[2], bounds.to(device), max(_PROOF_LENGTHS), scale)
            gradients = torch.autograd.grad((output.float() * weights).sum(), leaves)
            results.append([each.detach().float() for each in (output, *gradients)])
    errors = [(own - exact).norm() / exact.norm() for own, exact in zip(*results, strict=True)]
    return float(torch.stack(errors).max())


def _one_by_one(tensors: list[torch.Tensor], bounds: list[int], scale: float) -> torch.Tensor:
    """Attention within each sequence."""
    outputs = []
    for start, stop in pairwise(bounds):
        query, key, value = (tensor[start:stop].transpose(0, 1).unsqueeze(0) for tensor in tensors)
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        output = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def _of_torch() -> Varlen | None:
    """torch's function. Its arguments have changed from release to release."""
    try:
        varlen_attn: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    names = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    if not causal.keys() <= names.keys() or "scale" not in names:
        return None

    def attend_with_torch(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        longest: int,
        scale: float,
    ) -> torch.Tensor:
        groups, more = query.shape[1] // key.shape[1], {}
        if groups > 1 and "enable_gqa" in names:
            more["enable_gqa"] = True
        elif groups > 1:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        output: torch.Tensor = varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, **causal, **more
        )
        return output

    return attend_with_torch


def _of_flash_attention() -> Varlen | None:
    """The function of the package flash-attn, where it is installed."""
    try:
        flash_attn_varlen_func: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError):
        return None

    def attend_with_flash_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        longest: int,
        scale: float,
    ) -> torch.Tensor:
        output: torch.Tensor = flash_attn_varlen_func(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=True
        )
        return output

    return attend_with_flash_attention
