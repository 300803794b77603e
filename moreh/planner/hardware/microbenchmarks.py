"""Benchmarks of one worker process, while all others run them too.

Workers share memory and links, so a rate that one worker reaches alone means little. Each worker is a process of its
own, started by worker_processes.py. The workers wait for each other before every measurement. Where there are more
workers than cores, CPU time is measured: how long a worker waits for a core depends on what the others do.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from moreh.planner.hardware.local_profile import concurrent_workers
from moreh.planner.hardware.worker_processes import FIGURES_FILE

# Rows, inner and outer size of matmuls on CPU: several depths of one result, and several results of one depth. Each
# takes a few milliseconds, less than a time slice of another program.
MATMUL_DEPTHS = ((512, 64, 512), (512, 128, 512), (512, 512, 512), (256, 2048, 256), (256, 1024, 512))
MATMUL_RESULTS = ((32, 256, 256), (128, 256, 256), (256, 256, 256), (512, 256, 1024))
# Factor of sizes on GPUs, which are so fast that the sizes above would measure kernel launches only.
GPU_SCALE = 8
# Batch, heads, length and head size of attention.
ATTENTION_SHAPE = (2, 4, 512, 64)
# More than the caches of CPUs hold.
MEMORY_BYTES = 64 * 2**20
# Bytes of a collective, and how often it is repeated: all workers must agree on the number.
COLLECTIVES = {4 * 2**10: 15, 64 * 2**10: 11, 2**20: 7, 4 * 2**20: 5, 16 * 2**20: 3}
# Tiny operations in a row.
CHAIN = 100
# Seconds of one measurement in one pass, and of all passes.
BUDGET_S = 0.02
ALL_PASSES_S = 5.0

# Seconds by measurement: ("matmul", compute, rows, inner, outer), ("copy",), ...
Figures = dict[tuple[str | int, ...], float]


class Worker:
    """One worker on its device, in a process group with the others if there are any."""

    def __init__(self, rank: int, workers: int, rendezvous: Path) -> None:
        self.rank, self.workers = rank, workers
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
        self.half, self.scale = torch.bfloat16, 1
        self.shares_cores = concurrent_workers(workers, torch.get_num_threads()) is not None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            self.half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
            self.scale = GPU_SCALE
        if workers > 1:
            # NCCL refuses two ranks on one GPU.
            backend = "nccl" if gpus >= workers else "gloo"
            dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=workers)

    def measure(self) -> dict[str, Any]:
        """Every figure by the name of its field in LocalProfile. All workers return the same: the mean over them.

        Other programs make a measurement slower, never faster, so the best of several passes counts. Passes are added
        until a second one confirms 90 % of the figures, for ALL_PASSES_S at most.
        """
        begin = time.perf_counter()
        passes: list[Figures] = []
        confirmed = elapsed_s = 0.0
        while len(passes) < 3 or (confirmed < 0.9 and elapsed_s < ALL_PASSES_S):
            passes.append(self._one_pass())
            ordered = {key: sorted(figures[key] for figures in passes) for key in passes[0]}
            agree = [values[min(1, len(values) - 1)] < 1.25 * values[0] for values in ordered.values()]
            state: Figures = {("confirmed",): sum(agree) / len(agree), ("elapsed",): time.perf_counter() - begin}
            confirmed, elapsed_s = self._means(state).values()
        seconds = self._means({key: values[0] for key, values in ordered.items()})
        batch, heads, length, head_dim = ATTENTION_SHAPE
        # Only scores that the causal mask shows count.
        attention_flops = 4 * batch * self.scale * heads * length * (length / 2) * head_dim
        moved = (2 + 3) * MEMORY_BYTES * self.scale
        return {
            "matmuls": _records(seconds, "matmul", ("compute", "rows", "inner", "outer")),
            "attention_float32_flops_per_second": attention_flops / seconds["attention", "float32"],
            "attention_bf16_flops_per_second": attention_flops / seconds["attention", "half"],
            "memory_bytes_per_second": moved / (seconds["copy",] + seconds["add",]),
            # The forward pass is a part of the other figure. Where it seems to take longer, other programs disturbed
            # it.
            "forward_operation_s": min(seconds["forward",], seconds["autograd",]) / CHAIN,
            "autograd_operation_s": seconds["autograd",] / CHAIN,
            "collectives": _records(seconds, "collective", ("operation", "size_bytes")),
            **_overlap_shares(seconds),
            **self._hardware(),
            "confirmed": confirmed,
        }

    def _one_pass(self) -> Figures:
        """Seconds of everything that is measured, once."""
        figures: Figures = {}
        for compute, dtype in {"float32": torch.float32, "half": self.half}.items():
            for rows, inner, outer in MATMUL_DEPTHS + MATMUL_RESULTS:
                rows, outer = rows * self.scale, outer * self.scale
                figures["matmul", compute, rows, inner, outer] = self._matmul_s(rows, inner, outer, dtype)
            figures["attention", compute] = self._attention_s(dtype)
        figures |= self._memory_s() | self._operation_s()
        return figures | self._collectives() | self._overlap() if self.workers > 1 else figures

    def _matmul_s(self, rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
        """Seconds of the matmul of a linear layer."""
        x = torch.randn(rows, inner, device=self.device).to(dtype)
        weight = torch.randn(outer, inner, device=self.device).to(dtype)
        return self._typical_s(lambda: functional.linear(x, weight))

    def _attention_s(self, dtype: torch.dtype) -> float:
        """Seconds of causal attention, forward."""
        shape = (ATTENTION_SHAPE[0] * self.scale, *ATTENTION_SHAPE[1:])
        query, key, value = (torch.randn(shape, device=self.device).to(dtype) for _ in range(3))
        return self._typical_s(lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True))

    def _memory_s(self) -> Figures:
        """Seconds of a copy, which moves twice MEMORY_BYTES, and of an addition, which moves three times as much."""
        elements = MEMORY_BYTES // 4 * self.scale
        a, b, out = (torch.ones(elements, device=self.device) for _ in range(3))
        return {
            ("copy",): self._typical_s(lambda: out.copy_(a)),
            ("add",): self._typical_s(lambda: torch.add(a, b, out=out)),
        }

    def _operation_s(self) -> Figures:
        """Seconds of CHAIN operations of layers on tiny tensors: forward alone, and forward with backward."""
        layer = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()).to(self.device)
        start = torch.ones(4, 16, device=self.device)

        def chain() -> torch.Tensor:
            x = start
            for _ in range(CHAIN // 4):
                x = x + layer(x)
            return x.sum()

        def forward() -> None:
            with torch.no_grad():
                chain()

        return {
            ("forward",): self._typical_s(forward),
            ("autograd",): self._typical_s(lambda: torch.autograd.grad(chain(), list(layer.parameters()))),
        }

    def _collectives(self) -> Figures:
        """Seconds of all-reduces and all-gathers, by the bytes of the whole result."""
        figures: Figures = {}
        # Releases of torch before 2.13 have only the older name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        for size, repetitions in COLLECTIVES.items():
            shard = torch.ones(-(-size // 4 // self.workers), device=self.device)
            full = torch.ones(shard.numel() * self.workers, device=self.device)
            all_reduce = functools.partial(dist.all_reduce, full, dist.ReduceOp.MAX)
            all_gather = functools.partial(gather, full, shard)
            figures["collective", "all-reduce", full.nbytes] = self._typical_s(all_reduce, repetitions)
            figures["collective", "all-gather", full.nbytes] = self._typical_s(all_gather, repetitions)
        return figures

    def _overlap(self) -> Figures:
        """Seconds of matmuls and of an all-reduce that takes about as long: alone, overlapped, and in a row."""
        x = torch.randn(256 * self.scale, 256 * self.scale, device=self.device)
        large, tiny = torch.ones(2**20 * self.scale**2, device=self.device), torch.ones(1, device=self.device)

        def multiply() -> None:
            for _ in range(8):
                x @ x

        def multiply_during_exchange() -> None:
            exchange = dist.all_reduce(large, dist.ReduceOp.MAX, async_op=True)
            multiply()
            exchange.wait()

        def multiply_before_exchange() -> None:
            multiply()
            dist.all_reduce(tiny, dist.ReduceOp.MAX)

        return {
            ("multiply",): self._typical_s(multiply, 5),
            ("exchange",): self._typical_s(lambda: dist.all_reduce(large, dist.ReduceOp.MAX), 5),
            ("exchange tiny",): self._typical_s(lambda: dist.all_reduce(tiny, dist.ReduceOp.MAX), 9),
            ("multiply during exchange",): self._typical_s(multiply_during_exchange, 5),
            ("multiply before exchange",): self._typical_s(multiply_before_exchange, 5),
        }

    def _means(self, figures: Figures) -> Figures:
        """The means over the workers, so that all of them continue with the same numbers."""
        if self.workers == 1:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(figures, (values / self.workers).tolist(), strict=True))

    def _typical_s(self, run: Callable[[], object], repetitions: int | None = None) -> float:
        """The lower quartile of the seconds of `run`, without its first call.

        Where workers share cores, it is the mean of the CPU seconds of a thread: each switch between workers adds some.

        Args:
            repetitions: How often to run; None for as often as BUDGET_S allows, and at least 3 times.
        """
        run()
        self._synchronize()
        if self.workers > 1:
            dist.barrier()
        seconds: list[float] = []
        clock = time.process_time if self.shares_cores else time.perf_counter
        begin = time.perf_counter()
        while len(seconds) < (repetitions or 3) or (repetitions is None and time.perf_counter() < begin + BUDGET_S):
            start = clock()
            run()
            self._synchronize()
            seconds.append(clock() - start)
        if self.shares_cores:
            return sum(seconds) / len(seconds) / torch.get_num_threads()
        return sorted(seconds)[len(seconds) // 4]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _hardware(self) -> dict[str, int]:
        """Memory that each worker may use, and the units that each work on a tile of a matmul.

        Workers on CPU share the memory that is free now. The cores share every matmul, so they count as one unit.
        """
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            return {"memory_mib": properties.total_memory // 2**20, "compute_units": properties.multi_processor_count}
        return {"memory_mib": psutil.virtual_memory().available // self.workers // 2**20, "compute_units": 1}


def _records(seconds: Figures, kind: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The figures of one kind: for each the parts of its key by `names`, and its seconds."""
    return [dict(zip(names, key[1:], strict=True), seconds=value) for key, value in seconds.items() if key[0] == kind]


def _overlap_shares(seconds: Figures) -> dict[str, float]:
    """LocalProfile's contention and skew, 0 to 1."""
    if ("multiply",) not in seconds:
        return {"contention": 0.0, "skew": 0.0}
    shorter, longer = sorted((seconds["multiply",], seconds["exchange",]))
    contention = (seconds["multiply during exchange",] - longer) / shorter
    skew = (seconds["multiply before exchange",] - seconds["exchange tiny",]) / seconds["multiply",] - 1
    return {"contention": min(max(contention, 0.0), 1.0), "skew": min(max(skew, 0.0), 1.0)}


def main() -> None:
    """Measure as one of several workers. Rank 0 writes the figures to FIGURES_FILE."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in {"rank": int, "workers": int, "threads": int, "directory": Path}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = Worker(arguments.rank, arguments.workers, arguments.directory / "rendezvous").measure()
    if arguments.rank == 0:
        (arguments.directory / FIGURES_FILE).write_text(json.dumps(figures), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
