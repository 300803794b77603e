"""Causal attention in blocks (moreh/runtime/kernels/attention.py) beside torch's own kernel on a processor: forward and backward pass.

python benchmarks/attention.py

Both are computed in turns; times are medians. Rows of 1,024 tokens together, heads of size 64.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from moreh.runtime.kernels.attention import causal_attention

TOKENS = 1024
ROUNDS = 9


def main() -> None:
    """Print a table."""
    print("| rows x tokens | heads | type | torch, ms | in blocks, ms | x | one packed row, ms |")
    print("|---|---|---|---|---|---|---|")
    for length in (32, 64, 128, 256, 512):
        for heads in (4, 9, 16):
            for dtype in (torch.float32, torch.bfloat16):
                print(compare(length, heads, dtype), flush=True)


def compare(length: int, heads: int, dtype: torch.dtype) -> str:
    """A row of the table."""
    rows = TOKENS // length
    query, key, value = (
        torch.randn(rows, length, heads, 64, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)
    )
    packed = [torch.randn(1, TOKENS, heads, 64, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    starts = tuple(range(0, TOKENS, length))
    runs: list[Callable[[], torch.Tensor]] = [
        lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2),
        lambda: causal_attention(query, key, value, 0.125, (0,)),
        lambda: causal_attention(packed[0], packed[1], packed[2], 0.125, starts),
    ]
    gradients = [torch.randn(rows, length, heads, 64, dtype=dtype)] * 2 + [
        torch.randn(1, TOKENS, heads, 64, dtype=dtype)
    ]
    seconds: list[list[float]] = [[], [], []]
    for number in range(ROUNDS + 2):
        for run, gradient, into in zip(runs, gradients, seconds, strict=True):
            start = time.perf_counter()
            run().backward(gradient)
            if number >= 2:
                into.append(time.perf_counter() - start)
    own, blocks, one_row = (1000 * statistics.median(found) for found in seconds)
    kind = str(dtype).removeprefix("torch.")
    return f"| {rows} x {length} | {heads} | {kind} | {own:.2f} | {blocks:.2f} | {own / blocks:.2f} | {one_row:.2f} |"


if __name__ == "__main__":
    main()
