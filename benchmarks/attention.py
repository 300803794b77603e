"""Time causal attention in blocks (moreh/runtime/kernels/attention/causal.py) beside torch's own CPU kernel.

python benchmarks/attention.py

Forward and backward pass of 1,024 tokens with heads of size 64, as a batch of rows and as one packed row. All three
take turns; times are medians.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from moreh.runtime.kernels.attention.causal import causal_attention

TOKENS = 1024
HEAD_DIM = 64
SCALE = HEAD_DIM**-0.5
ROUNDS = 9
WARMUP_ROUNDS = 2


def main() -> None:
    """Print a table."""
    print("| rows x tokens | heads | dtype | torch, ms | in blocks, ms | x | one packed row, ms |")
    print("|---|---|---|---|---|---|---|")
    for length in (32, 64, 128, 256, 512):
        for heads in (4, 9, 16):
            for dtype in (torch.float32, torch.bfloat16):
                print(compare(length, heads, dtype), flush=True)


def compare(length: int, heads: int, dtype: torch.dtype) -> str:
    """A row of the table."""
    rows = TOKENS // length
    query, key, value = _inputs(rows, length, heads, dtype)
    packed_query, packed_key, packed_value = _inputs(1, TOKENS, heads, dtype)
    cu_seqlens = tuple(range(0, TOKENS + 1, length))
    forwards: list[Callable[[], torch.Tensor]] = [
        lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2),
        lambda: causal_attention(query, key, value, SCALE),
        lambda: causal_attention(packed_query, packed_key, packed_value, SCALE, cu_seqlens),
    ]
    grad_output = torch.randn(rows, length, heads, HEAD_DIM, dtype=dtype)
    grad_outputs = [grad_output, grad_output, grad_output.view(1, TOKENS, heads, HEAD_DIM)]
    seconds: list[list[float]] = [[] for _ in forwards]
    for round_index in range(WARMUP_ROUNDS + ROUNDS):
        for forward, grad, times in zip(forwards, grad_outputs, seconds, strict=True):
            start = time.perf_counter()
            forward().backward(grad)
            if round_index >= WARMUP_ROUNDS:
                times.append(time.perf_counter() - start)
    torch_ms, blocks_ms, packed_ms = (1000 * statistics.median(times) for times in seconds)
    name = str(dtype).removeprefix("torch.")
    return (
        f"| {rows} x {length} | {heads} | {name} | {torch_ms:.2f} | {blocks_ms:.2f} | {torch_ms / blocks_ms:.2f} "
        f"| {packed_ms:.2f} |"
    )


def _inputs(rows: int, length: int, heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value `[rows, heads, length, head_dim]`."""
    return [torch.randn(rows, length, heads, HEAD_DIM, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


if __name__ == "__main__":
    main()
