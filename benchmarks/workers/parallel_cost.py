"""The overhead of parallelism: a training step on several workers against one, on the cores of this machine.

python benchmarks/workers/parallel_cost.py [--rounds 5] [--profile]

One worker computes with all cores. Several workers have one thread each, and shard the model as a plan says. Where
there are more workers than cores, they share the cores: compare their CPU time, not their speed. Each setup takes
turns with one worker; the ratios are those of medians.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
from dataclasses import dataclass

from team import Shape, Team

STEPS_PER_ROUND = 2


# Both are small enough to wait for, and large enough that sharding them makes sense.
SPEED = Shape(layers=8, hidden=512, heads=16, intermediate=1408, vocabulary=8192, batch_size=16, sequence_length=256)
SPLIT = Shape(layers=8, hidden=768, heads=16, intermediate=2048, vocabulary=8192, batch_size=8, sequence_length=256)
# FSDP moves parameters, not activations: its cost per token falls with the tokens of each worker.
LARGER_BATCH = dataclasses.replace(SPLIT, batch_size=32)


@dataclass(frozen=True)
class Setup:
    """A number of workers and how they train."""

    name: str
    """The name in the table."""
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
        setups = (alone, setup)
        teams = [Team(s.workers, s.threads, f"{directory}/{s.workers}") for s in setups]
        for team, s in zip(teams, setups, strict=True):
            team.build(s.shape, s.plan)
        measured: list[list[tuple[float, float]]] = [[], []]
        for _ in range(rounds):
            for team, runs in zip(teams, measured, strict=True):
                runs.append(team.run(STEPS_PER_ROUND))
        wall_alone, wall_s = (statistics.median(wall for wall, _ in runs) / STEPS_PER_ROUND for runs in measured)
        cpu_alone, cpu_s = (statistics.median(cpu for _, cpu in runs) / STEPS_PER_ROUND for runs in measured)
        print(
            f"| {setup.name} | {setup.workers} x {setup.threads} | `{setup.plan}` | "
            f"{setup.shape.tokens / wall_s:,.0f} | {wall_alone / wall_s:.2f} | {cpu_s:.2f} | {cpu_s / cpu_alone:.2f} |",
            flush=True,
        )
        profiles = [
            f"{s.name} for {setup.name}, worker 0, one step:\n{team.profile()}"
            for team, s in zip(teams, setups, strict=True)
        ]
        for team in teams:
            team.stop()
    return "\n\n".join(profiles)


if __name__ == "__main__":
    main()
