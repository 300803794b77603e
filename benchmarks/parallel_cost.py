"""What it costs to be parallel: a training step on several workers against one, on the cores of this machine.

python benchmarks/parallel_cost.py [--rounds 5] [--profile]

One worker computes with all cores. Several workers have one thread each and divide the model as a plan says; those that are
more than the cores share them, so that their processor time is compared, not their speed. Each setup takes turns with one
worker; the ratios are those of medians.
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
    hidden: int
    inner: int
    vocabulary: int
    rows: int
    sequence_length: int


# Both are small enough to wait for, and large enough that nobody would ask what dividing them is for.
SPEED = Shape(layers=8, hidden=512, inner=1408, vocabulary=8192, rows=16, sequence_length=256)
SPLIT = Shape(layers=8, hidden=768, inner=2048, vocabulary=8192, rows=8, sequence_length=256)
# Sharding moves the parameters and not the activations: what it costs falls with the tokens of each worker.
MORE_ROWS = dataclasses.replace(SPLIT, rows=32)


@dataclass(frozen=True)
class Setup:
    """Workers that take part in the comparison; no plan is one worker that computes as transformers does."""

    name: str
    shape: Shape
    workers: int
    threads: int
    plan: str = ""


SETUPS = (
    Setup("data parallel", SPEED, 2, 1, "tp1 pp1 dp2 mb8x1"),
    Setup("data parallel, sharded", SPEED, 2, 1, "tp1 pp1 dp2 mb8x1 shard:optimizer"),
    Setup("sharded parameters, 256 tokens each", SPLIT, 8, 1, "tp1 pp1 dp8 mb1x1 shard:parameters"),
    Setup("sharded parameters, 1,024 tokens each", MORE_ROWS, 8, 1, "tp1 pp1 dp8 mb4x1 shard:parameters"),
    Setup("pipeline", SPLIT, 8, 1, "tp1 pp8 dp1 mb1x8"),
    Setup("tensor parallel", SPLIT, 8, 1, "tp8 pp1 dp1 mb8x1"),
    Setup("tensor parallel, sequence too", SPLIT, 8, 1, "tp8 pp1 dp1 mb8x1 sp"),
    Setup("all of them", SPLIT, 8, 1, "tp2 pp2 dp2 mb2x2 shard:parameters sp"),
)


def main() -> None:
    """Run the comparisons and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="setups whose names contain this")
    parser.add_argument("--profile", action="store_true", help="show what worker 0 of each setup spends a step with")
    arguments = parser.parse_args()
    print(f"Medians of {arguments.rounds} rounds of {STEPS_PER_ROUND} steps, each setup in turns with one worker")
    print("| setup | workers x threads | plan | tokens/s | x one worker | processor s/step | x one worker |")
    print("|---|---|---|---|---|---|---|", flush=True)
    profiles = [compare(setup, arguments.rounds) for setup in SETUPS if arguments.only in setup.name]
    if arguments.profile:
        print("\n\n".join(profiles))


def compare(setup: Setup, rounds: int) -> str:
    """Measure a setup in turns with one worker, print its row and return profiles of both.

    Only these processes are there at the same time: all setups together would not fit into the memory of a small machine.
    """
    alone = Setup("one worker", setup.shape, 1, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as directory:
        teams = [_Team(alone, ""), _Team(setup, f"{directory}/store")]
        for team in teams:
            team.run(1)  # divides the model
        measured: list[list[tuple[float, float]]] = [[], []]
        for _ in range(rounds):
            for team, figures in zip(teams, measured, strict=True):
                figures.append(team.run(STEPS_PER_ROUND))
        wall, wall_of_setup = (statistics.median(w for w, _ in figures) / STEPS_PER_ROUND for figures in measured)
        used, used_by_setup = (statistics.median(p for _, p in figures) / STEPS_PER_ROUND for figures in measured)
        tokens = setup.shape.rows * setup.shape.sequence_length
        print(
            f"| {setup.name} | {setup.workers} x {setup.threads} | `{setup.plan}` | {tokens / wall_of_setup:,.0f} | "
            f"{wall / wall_of_setup:.2f} | {used_by_setup:.2f} | {used_by_setup / used:.2f} |",
            flush=True,
        )
        profiles = [f"{team.setup.name} for {setup.name}, worker 0, one step:\n{team.profile()}" for team in teams]
        for team in teams:
            team.stop()
    return "\n\n".join(profiles)


class _Team:
    """The processes of a setup, which wait for what they are told."""

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
        """Seconds of the slowest worker and processor seconds of all."""
        answers = self._tell(steps)
        return max(wall for wall, _ in answers), sum(used for _, used in answers)

    def profile(self) -> str:
        """What worker 0 spends a step with."""
        return str(self._tell("profile")[0])

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()

    def _tell(self, what: Any) -> list[Any]:
        for connection in self._connections:
            connection.send(what)
        return [connection.recv() for connection in self._connections]


def _work(setup: Setup, rank: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(setup.threads)
    step = _training_step(setup, rank, store)
    while True:
        told = connection.recv()
        if told == "profile":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                step()
            averages = profiler.key_averages()
            connection.send(averages.table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=60))
            continue
        start, used = time.perf_counter(), time.process_time()
        for _ in range(told):
            step()
        connection.send((time.perf_counter() - start, time.process_time() - used))


def _training_step(setup: Setup, rank: int, store: str) -> Callable[[], None]:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = setup.shape
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
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
        training = Training(describe_module(model), shape.rows, shape.sequence_length)
        shard_model(model, parse_plan(setup.plan, training, setup.workers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(shape.vocabulary, (shape.rows, shape.sequence_length))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()

    return step


if __name__ == "__main__":
    main()
