"""What it costs to be parallel: a training step on several workers against one, on the cores of this machine.

python benchmarks/parallel_cost.py [--rounds 5] [--profile]

One worker computes with all cores. Several workers have one thread each, and shard the model as a plan says. Where
there are more workers than cores, they share the cores: compare their CPU time, not their speed. Each setup takes
turns with one worker; the ratios are those of medians.
"""

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from moreh.models.describe.from_module import describe_module
from moreh.planner.plan.notation import parse_plan
from moreh.planner.plan.plan import Training

STEPS_PER_ROUND = 2


@dataclass(frozen=True)
class Shape:
    """A Llama and its batches."""

    layers: int
    """Decoder layers."""
    hidden: int
    """Hidden size."""
    intermediate: int
    """Size of the MLP's hidden layer."""
    vocabulary: int
    """Tokens in the vocabulary."""
    batch_size: int
    """Sequences of a batch."""
    sequence_length: int
    """Tokens of a sequence."""


# Both are small enough to wait for, and large enough that sharding them makes sense.
SPEED = Shape(layers=8, hidden=512, intermediate=1408, vocabulary=8192, batch_size=16, sequence_length=256)
SPLIT = Shape(layers=8, hidden=768, intermediate=2048, vocabulary=8192, batch_size=8, sequence_length=256)
# FSDP moves parameters, not activations: what it costs a token falls with the tokens of each worker.
LARGER_BATCH = dataclasses.replace(SPLIT, batch_size=32)


@dataclass(frozen=True)
class Setup:
    """A number of workers and how they train."""

    name: str
    """What the table calls it."""
    shape: Shape
    """The model and its batches."""
    workers: int
    """Processes."""
    threads: int
    """Threads of each."""
    plan: str = ""
    """The plan in `moreh-plan`'s notation. Empty for one worker that computes as transformers does."""


SETUPS = (
    Setup("data parallel", SPEED, 2, 1, "tp1 pp1 dp2 mb8x1"),
    Setup("data parallel, sharded", SPEED, 2, 1, "tp1 pp1 dp2 mb8x1 shard:optimizer"),
    Setup("sharded parameters, 256 tokens each", SPLIT, 8, 1, "tp1 pp1 dp8 mb1x1 shard:parameters"),
    Setup("sharded parameters, 1,024 tokens each", LARGER_BATCH, 8, 1, "tp1 pp1 dp8 mb4x1 shard:parameters"),
    Setup("pipeline", SPLIT, 8, 1, "tp1 pp8 dp1 mb1x8"),
    Setup("tensor parallel", SPLIT, 8, 1, "tp8 pp1 dp1 mb8x1"),
    Setup("tensor and sequence parallel", SPLIT, 8, 1, "tp8 pp1 dp1 mb8x1 sp"),
    Setup("all of them", SPLIT, 8, 1, "tp2 pp2 dp2 mb2x2 shard:parameters sp"),
)


def main() -> None:
    """Run the comparisons and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="setups whose names contain this")
    parser.add_argument("--profile", action="store_true", help="profile a step of worker 0 of each setup")
    arguments = parser.parse_args()
    print(f"Medians of {arguments.rounds} rounds of {STEPS_PER_ROUND} steps, each setup in turns with one worker")
    print("| setup | workers x threads | plan | tokens/s | x one worker | CPU s/step | x one worker |")
    print("|---|---|---|---|---|---|---|", flush=True)
    profiles = [compare(setup, arguments.rounds) for setup in SETUPS if arguments.only in setup.name]
    if arguments.profile:
        print("\n\n".join(profiles))


def compare(setup: Setup, rounds: int) -> str:
    """Measure a setup in turns with one worker, print its row and return profiles of both.

    Only their processes run at the same time: all setups together would not fit into the memory of a small machine.
    """
    alone = Setup("one worker", setup.shape, 1, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as directory:
        teams = [_Team(alone, ""), _Team(setup, f"{directory}/store")]
        for team in teams:
            team.run(1)  # shards the model
        measured: list[list[tuple[float, float]]] = [[], []]
        for _ in range(rounds):
            for team, runs in zip(teams, measured, strict=True):
                runs.append(team.run(STEPS_PER_ROUND))
        wall_alone, wall_s = (statistics.median(wall for wall, _ in runs) / STEPS_PER_ROUND for runs in measured)
        cpu_alone, cpu_s = (statistics.median(cpu for _, cpu in runs) / STEPS_PER_ROUND for runs in measured)
        tokens = setup.shape.batch_size * setup.shape.sequence_length
        print(
            f"| {setup.name} | {setup.workers} x {setup.threads} | `{setup.plan}` | {tokens / wall_s:,.0f} | "
            f"{wall_alone / wall_s:.2f} | {cpu_s:.2f} | {cpu_s / cpu_alone:.2f} |",
            flush=True,
        )
        profiles = [f"{team.setup.name} for {setup.name}, worker 0, one step:\n{team.profile()}" for team in teams]
        for team in teams:
            team.stop()
    return "\n\n".join(profiles)


class _Team:
    """The processes of a setup, which wait for requests."""

    def __init__(self, setup: Setup, store: str) -> None:
        self.setup = setup
        context = multiprocessing.get_context("spawn")
        self._processes, self._connections = [], []
        for rank in range(setup.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(setup, rank, store, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._connections.append(ours)

    def run(self, steps: int) -> tuple[float, float]:
        """Run some steps; returns the seconds of the slowest worker, and the CPU seconds of all."""
        answers = self._request(steps)
        return max(wall for wall, _ in answers), sum(cpu for _, cpu in answers)

    def profile(self) -> str:
        """A profile of worker 0's step, as a table."""
        return str(self._request("profile")[0])

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()

    def _request(self, request: int | str) -> list[Any]:
        for connection in self._connections:
            connection.send(request)
        return [connection.recv() for connection in self._connections]


def _work(setup: Setup, rank: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(setup.threads)
    step = _training_step(setup, rank, store)
    while True:
        request = connection.recv()
        if request == "profile":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                step()
            averages = profiler.key_averages()
            connection.send(averages.table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=60))
            continue
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(request):
            step()
        connection.send((time.perf_counter() - wall_start, time.process_time() - cpu_start))


def _training_step(setup: Setup, rank: int, store: str) -> Callable[[], None]:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = setup.shape
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.sequence_length,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    if setup.workers > 1:
        import torch.distributed as dist

        from moreh.runtime.engine.registry import install_sharding_support, shard_model

        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=setup.workers)
        install_sharding_support()
        training = Training(describe_module(model), shape.batch_size, shape.sequence_length)
        shard_model(model, parse_plan(setup.plan, training, setup.workers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(shape.vocabulary, (shape.batch_size, shape.sequence_length))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()

    return step


if __name__ == "__main__":
    main()
