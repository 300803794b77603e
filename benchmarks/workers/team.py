"""A team of processes that train small Llamas by a plan, for the benchmarks of this folder."""

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from torch.distributed import Work
from torch.nn import functional

from moreh.models.describe.from_module import describe_module
from moreh.planner.plan.notation import parse_plan
from moreh.planner.plan.plan import Training

_MEASURED_STEP = "measured step"
# Seconds after which gloo's thread has let go of the tensors of a collective that is done.
_RELEASE_S = 0.005


@dataclass(frozen=True)
class Shape:
    """A Llama and its batches."""

    layers: int
    """Decoder layers."""
    hidden: int
    """Hidden size."""
    heads: int
    """Heads of the queries, twice those of keys and values."""
    intermediate: int
    """Size of the MLP's hidden layer."""
    vocabulary: int
    """Tokens in the vocabulary."""
    batch_size: int
    """Sequences of a batch."""
    sequence_length: int
    """Tokens of a sequence."""

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch_size * self.sequence_length

    def build(self, device: str = "cpu") -> nn.Module:
        """The model with the random weights of seed 0."""
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama",
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.sequence_length,
            tie_word_embeddings=False,
        )
        with torch.device(device):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
        return model

    def training(self, model: nn.Module) -> Training:
        """The planner's description of training `build`'s model."""
        return Training(describe_module(model), self.batch_size, self.sequence_length)


class Team:
    """Processes that wait for requests."""

    def __init__(self, workers: int, threads: int, store: str) -> None:
        """Start `workers` processes with `threads` threads each. They meet at `store`, a file that does not exist."""
        context = multiprocessing.get_context("spawn")
        self._processes, self._connections = [], []
        for rank in range(workers):
            ours, theirs = context.Pipe()
            arguments = (rank, workers, threads, store, theirs)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)
            self._connections.append(ours)

    def build(self, shape: Shape, plan: str = "") -> None:
        """Make a model and divide it as the plan says, in `moreh-plan`'s notation. Its first step is done."""
        self._request("build", shape, plan)

    def choose_loss(self, name: str) -> None:
        """Train on one of `LOSSES` from the next step on."""
        self._request("choose_loss", name)

    def run(self, steps: int) -> tuple[float, float]:
        """Run some steps; returns the seconds of the slowest worker, and the CPU seconds of all."""
        answers = self._request("run", steps)
        return max(wall for wall, _ in answers), sum(cpu for _, cpu in answers)

    def peak_bytes(self, shape: Shape, plan: str) -> int:
        """The peak of live tensors during a step on the fullest worker, in bytes. Makes the model anew."""
        return max(self._request("peak_bytes", shape, plan))

    def profile(self) -> str:
        """A profile of a step of worker 0, as a table."""
        return str(self._request("profile")[0])

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()

    def _request(self, name: str, *arguments: object) -> list[Any]:
        for connection in self._connections:
            connection.send((name, arguments))
        return [connection.recv() for connection in self._connections]


def _work(rank: int, workers: int, threads: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(threads)
    if workers > 1:
        import torch.distributed as dist

        from moreh.runtime.engine.sharded.install import install_sharding_support

        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
        install_sharding_support()
    member = _Member(workers)
    while True:
        name, arguments = connection.recv()
        connection.send(getattr(member, name)(*arguments))


class _Member:
    """One process of a team."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._step: Callable[[], None] = lambda: None
        self._loss = LOSSES["built-in"]

    def choose_loss(self, name: str) -> None:
        self._loss = LOSSES[name]

    def build(self, shape: Shape, plan: str) -> None:
        self._step = lambda: None  # frees the model before
        model = shape.build()
        if self._workers > 1:
            from moreh.runtime.engine.sharded.shard_model import shard_model

            shard_model(model, parse_plan(plan, shape.training(model), self._workers))
        # Several workers train as under the line, which chooses torch's fused kernels.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=self._workers > 1)
        ids = torch.randint(shape.vocabulary, (shape.batch_size, shape.sequence_length))
        self._step = lambda: _train(model, optimizer, ids, self._loss)
        self._step()

    def run(self, steps: int) -> tuple[float, float]:
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._step()
        return time.perf_counter() - wall_start, time.process_time() - cpu_start

    def peak_bytes(self, shape: Shape, plan: str) -> int:
        # What earlier models leave would be freed while this one is measured.
        self._step = lambda: None
        gc.collect()
        # MemTracker cannot track sharded parameters. The profiler reports each allocation, and the release of each
        # allocation that it has seen: from before the model is made, their sum is what is alive.
        activities = [torch.profiler.ProfilerActivity.CPU]
        with _releases_in_view(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            self.build(shape, plan)
            with torch.profiler.record_function(_MEASURED_STEP):
                self._step()
        # What is freed later, while the next model is measured, would count as freed there.
        self._step = lambda: None
        gc.collect()
        events = profiler.profiler.kineto_results.events()
        begin = next(event.start_ns() for event in events if event.name() == _MEASURED_STEP)
        alive = peak = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            alive += event.nbytes()
            if event.start_ns() >= begin:
                peak = max(peak, alive)
        return peak

    def profile(self) -> str:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            self._step()
        return str(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=60))


@contextmanager
def _releases_in_view() -> Iterator[None]:
    """Let this thread be the last one to hold the tensors of a collective.

    gloo's thread holds them until a moment after `wait` returns. If it is the last to let go, the profiler, which sees
    only the threads that it was started on, counts them as alive for ever.
    """
    work_class: Any = Work
    wait = work_class.wait

    def wait_for_thread(work: Work, *arguments: Any) -> Any:
        done = wait(work, *arguments)
        time.sleep(_RELEASE_S)
        return done

    work_class.wait = wait_for_thread
    try:
        yield
    finally:
        work_class.wait = wait


def _built_in(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _cross_entropy(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _with_z_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return loss + 1e-4 * logits.logsumexp(-1).square().mean()


LOSSES: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "built-in": _built_in,
    "cross-entropy of the logits": _cross_entropy,
    "with z-loss": _with_z_loss,
}
"""The losses that a team trains on: the model's own loss, and losses that a script makes of its logits."""


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor],
) -> None:
    loss(model, ids).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.zero_grad()
