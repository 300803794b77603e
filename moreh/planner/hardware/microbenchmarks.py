"""What one worker of this machine measures while all others do: `python -m moreh.planner.hardware.microbenchmarks`.

Workers share cores, memory and links, so that a rate that one of them reaches alone means little. Each is a process of its own
that local_machine.py starts; before every measurement they wait for each other.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from moreh.errors import PlanError

# Rows, inner and outer size of matrix products on a processor: several depths of one result, several results of one depth.
# Each takes few milliseconds, less than what the system gives another program at a time.
DEPTHS = ((512, 64, 512), (512, 128, 512), (512, 512, 512), (256, 2048, 256), (256, 1024, 512))
RESULTS = ((32, 256, 256), (128, 256, 256), (256, 256, 256), (512, 256, 1024))
# Devices with their own memory are so much faster that those sizes would measure the start of kernels only.
DEVICE_SCALE = 8
# Batch, heads, length and head size of attention.
ATTENTION_SHAPE = (2, 4, 512, 64)
# More than processors' caches hold.
MEMORY_BYTES = 64 * 2**20
# Bytes of a collective, and how often it is repeated: all workers must agree on the number.
COLLECTIVES = {4 * 2**10: 15, 64 * 2**10: 11, 2**20: 7, 4 * 2**20: 5, 16 * 2**20: 3}
CHAIN = 100  # tiny operations in a row
# Of one measurement in one pass, and of all passes.
BUDGET_S = 0.02
ALL_PASSES_S = 5.0
FIGURES_FILE = "figures.json"
TIMEOUT_S = 180.0

# Seconds by what took them: ("product", compute, rows, inner, outer), ("copy",), ...
Figures = dict[tuple[str | int, ...], float]


class Worker:
    """One worker on its device, with the others in a process group if there are any."""

    def __init__(self, rank: int, workers: int, rendezvous: Path) -> None:
        self.rank, self.workers = rank, workers
        self.device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
        self.half, self.scale = torch.bfloat16, 1
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            self.half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
            self.scale = DEVICE_SCALE
        if workers > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=workers)

    def measure(self) -> dict[str, Any]:
        """Every figure, under the names that LocalProfile has for them; the same for all workers: the mean over them.

        Other programs make a measurement slower, never faster: the best of several passes counts. Passes are added until a
        second one confirms nine tenths of the figures, for some seconds at most.
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
        # Only what the causal mask shows is counted.
        attention_flops = 4 * batch * self.scale * heads * length * (length / 2) * head_dim
        moved = (2 + 3) * MEMORY_BYTES * self.scale
        return {
            "products": _records(seconds, "product", ("compute", "rows", "inner", "outer")),
            "attention_float32_flops_per_second": attention_flops / seconds["attention", "float32"],
            "attention_bf16_flops_per_second": attention_flops / seconds["attention", "half"],
            "memory_bytes_per_second": moved / (seconds["copy",] + seconds["add",]),
            # A part of what the other figure is of: where it seems longer, another program has disturbed all its passes.
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
            for rows, inner, outer in DEPTHS + RESULTS:
                rows, outer = rows * self.scale, outer * self.scale
                figures["product", compute, rows, inner, outer] = self._matmul_s(rows, inner, outer, dtype)
            figures["attention", compute] = self._attention_s(dtype)
        figures |= self._memory_s() | self._operation_s()
        return figures | self._collectives() | self._overlap() if self.workers > 1 else figures

    def _matmul_s(self, rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
        """Seconds of the product of a linear layer."""
        values = torch.randn(rows, inner, device=self.device).to(dtype)
        weight = torch.randn(outer, inner, device=self.device).to(dtype)
        return self._typical_s(lambda: functional.linear(values, weight))

    def _attention_s(self, dtype: torch.dtype) -> float:
        """Seconds of causal attention, forward."""
        shape = (ATTENTION_SHAPE[0] * self.scale, *ATTENTION_SHAPE[1:])
        q, k, v = (torch.randn(shape, device=self.device).to(dtype) for _ in range(3))
        return self._typical_s(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True))

    def _memory_s(self) -> Figures:
        """Seconds of a copy, which moves twice MEMORY_BYTES, and of an addition, which moves three times as much."""
        elements = MEMORY_BYTES // 4 * self.scale
        left, right, result = (torch.ones(elements, device=self.device) for _ in range(3))
        return {
            ("copy",): self._typical_s(lambda: result.copy_(left)),
            ("add",): self._typical_s(lambda: torch.add(left, right, out=result)),
        }

    def _operation_s(self) -> Figures:
        """Seconds of CHAIN operations of layers on tiny tensors: of a forward pass, and of forward and backward pass."""
        layer = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()).to(self.device)
        start = torch.ones(4, 16, device=self.device)

        def chain() -> torch.Tensor:
            values = start
            for _ in range(CHAIN // 4):
                values = values + layer(values)
            return values.sum()

        def forward() -> None:
            with torch.no_grad():
                chain()

        return {
            ("forward",): self._typical_s(forward),
            ("autograd",): self._typical_s(lambda: torch.autograd.grad(chain(), list(layer.parameters()))),
        }

    def _collectives(self) -> Figures:
        """Seconds of all-reduces and all-gathers; the size in bytes is that of the whole result."""
        figures: Figures = {}
        for size, repetitions in COLLECTIVES.items():
            part = torch.ones(-(-size // 4 // self.workers), device=self.device)
            whole = torch.ones(part.numel() * self.workers, device=self.device)
            reduce = functools.partial(dist.all_reduce, whole, dist.ReduceOp.MAX)
            gather = functools.partial(dist.all_gather_single, whole, part)
            figures["collective", "all-reduce", whole.nbytes] = self._typical_s(reduce, repetitions)
            figures["collective", "all-gather", whole.nbytes] = self._typical_s(gather, repetitions)
        return figures

    def _overlap(self) -> Figures:
        """Seconds of products and of an all-reduce that takes about as long: alone, beside each other, and in a row."""
        values = torch.randn(256 * self.scale, 256 * self.scale, device=self.device)
        whole, tiny = torch.ones(2**20 * self.scale**2, device=self.device), torch.ones(1, device=self.device)

        def multiply() -> None:
            for _ in range(8):
                values @ values

        def multiply_beside() -> None:
            exchange = dist.all_reduce(whole, dist.ReduceOp.MAX, async_op=True)
            multiply()
            exchange.wait()

        def multiply_before() -> None:
            multiply()
            dist.all_reduce(tiny, dist.ReduceOp.MAX)

        return {
            ("multiply",): self._typical_s(multiply, 5),
            ("exchange",): self._typical_s(lambda: dist.all_reduce(whole, dist.ReduceOp.MAX), 5),
            ("exchange tiny",): self._typical_s(lambda: dist.all_reduce(tiny, dist.ReduceOp.MAX), 9),
            ("multiply beside",): self._typical_s(multiply_beside, 5),
            ("multiply before",): self._typical_s(multiply_before, 5),
        }

    def _means(self, figures: Figures) -> Figures:
        """The means over the workers, so that all of them go on with the same numbers."""
        if self.workers == 1:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(figures, (values / self.workers).tolist(), strict=True))

    def _typical_s(self, run: Callable[[], object], repetitions: int | None = None) -> float:
        """Seconds of `run` at its lower quartile, without the first call: of BUDGET_S, or of `repetitions`."""
        run()
        self._synchronize()
        if self.workers > 1:
            dist.barrier()
        seconds: list[float] = []
        begin = time.perf_counter()
        while len(seconds) < (repetitions or 3) or (repetitions is None and time.perf_counter() < begin + BUDGET_S):
            start = time.perf_counter()
            run()
            self._synchronize()
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[len(seconds) // 4]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _hardware(self) -> dict[str, int]:
        """Memory that each worker may use, and what works on a tile of a product each.

        Workers on the processor share the memory that is free now; its cores divide every product among them.
        """
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            return {"memory_mib": properties.total_memory // 2**20, "compute_units": properties.multi_processor_count}
        return {"memory_mib": psutil.virtual_memory().available // self.workers // 2**20, "compute_units": 1}


def _records(seconds: Figures, kind: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The figures of one kind, each with its seconds and the parts of its key under these names."""
    return [dict(zip(names, key[1:], strict=True), seconds=value) for key, value in seconds.items() if key[0] == kind]


def _overlap_shares(seconds: Figures) -> dict[str, float]:
    """LocalProfile's contention and skew, 0 to 1."""
    if ("multiply",) not in seconds:
        return {"contention": 0.0, "skew": 0.0}
    shorter, longer = sorted((seconds["multiply",], seconds["exchange",]))
    contention = (seconds["multiply beside",] - longer) / shorter
    skew = (seconds["multiply before",] - seconds["exchange tiny",]) / seconds["multiply",] - 1
    return {"contention": min(max(contention, 0.0), 1.0), "skew": min(max(skew, 0.0), 1.0)}


def run_workers(workers: int, threads: int) -> dict[str, Any]:
    """Measure in so many processes of so many threads each; returns what `Worker.measure` does.

    Raises:
        PlanError: one of the processes failed, or they took too long.
    """
    with tempfile.TemporaryDirectory(prefix="moreh-measure-") as name:
        directory = Path(name)
        # Not multiprocessing, which would run a script without a main guard again.
        command = [sys.executable, "-m", "moreh.planner.hardware.microbenchmarks", f"--directory={directory}"]
        command += [f"--workers={workers}", f"--threads={threads}"]
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))))
        # Threads that sleep while they wait are disturbed least by other programs.
        env = {"GOMP_SPINCOUNT": "1000"} | os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(workers):
                rank_command = [*command, f"--rank={rank}"]
                with (directory / f"{rank}.log").open("wb") as log:
                    processes.append(subprocess.Popen(rank_command, env=env, cwd=directory, stdout=log, stderr=log))
            _wait(processes, directory)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return json.loads((directory / FIGURES_FILE).read_text(encoding="utf-8"))


def _wait(processes: list[subprocess.Popen[bytes]], directory: Path) -> None:
    """Until all have ended well. Raises PlanError, with the last line that it wrote, as soon as one has failed."""
    deadline = time.monotonic() + TIMEOUT_S
    while (codes := [process.poll() for process in processes]) != [0] * len(processes):
        for rank, code in enumerate(codes):
            if code:
                lines = (directory / f"{rank}.log").read_text(encoding="utf-8", errors="replace").splitlines()
                last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
                raise PlanError(f"this machine could not be measured with {len(processes)} workers: {last.strip()}")
        if time.monotonic() > deadline:
            raise PlanError(f"measuring this machine with {len(processes)} workers took more than {TIMEOUT_S:.0f} s")
        time.sleep(0.02)


def main() -> None:
    """Measure as one of several workers; the first one writes the figures to FIGURES_FILE."""
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
