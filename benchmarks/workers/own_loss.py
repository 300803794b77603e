"""The cost of a custom loss on several workers: a step with it, compared with a step with the built-in loss.

python benchmarks/workers/own_loss.py [--rounds 5] [--only PART_OF_A_PLAN]

A loss that the script computes from the logits repeats some of the forward passes. Both steps have the same plan,
processes and model, and alternate. The ratios are those of medians: of the slowest worker's time, and of all CPU time.
Run it on a machine that does nothing else. Where there are fewer cores than workers, only the CPU time says something.
"""

import argparse
import statistics
import tempfile

from team import LOSSES, Shape, Team

STEPS_PER_ROUND = 2
SHAPE = Shape(layers=4, hidden=384, heads=8, intermediate=1024, vocabulary=4096, batch_size=16, sequence_length=128)
# In `moreh-plan`'s notation, with the number of workers.
PLANS = {
    "tp2 pp1 dp1 mb16x1": 2,
    "tp1 pp2 dp1 mb4x4": 2,
    "tp1 pp1 dp2 mb8x1 shard:parameters": 2,
    "tp2 pp2 dp1 mb4x4": 4,
    "tp1 pp2 dp2 mb2x4 shard:parameters": 4,
    "tp1 pp1 dp4 mb4x1 shard:parameters": 4,
    "tp4 pp1 dp1 mb16x1 sp": 4,
}


def main() -> None:
    """Run the comparisons and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="plans whose notations contain this")
    arguments = parser.parse_args()
    print(f"Medians of {arguments.rounds} rounds of {STEPS_PER_ROUND} steps, the losses in turns")
    print("| plan | loss | s/step | x built-in | CPU s/step | x built-in |")
    print("|---|---|---|---|---|---|", flush=True)
    for plan, workers in PLANS.items():
        if arguments.only in plan:
            compare(plan, workers, arguments.rounds)


def compare(plan: str, workers: int, rounds: int) -> None:
    """Measure the losses under one plan, and print their rows."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in LOSSES}
    with tempfile.TemporaryDirectory() as directory:
        team = Team(workers, 1, f"{directory}/store")
        team.build(SHAPE, plan)
        # The first round, in which memory is allocated, does not count.
        for number in range(rounds + 1):
            for name, runs in measured.items():
                team.choose_loss(name)
                run = team.run(STEPS_PER_ROUND)
                if number:
                    runs.append(run)
        team.stop()
    medians = {
        name: [statistics.median(run[index] for run in runs) / STEPS_PER_ROUND for index in (0, 1)]
        for name, runs in measured.items()
    }
    for name, (wall_s, cpu_s) in medians.items():
        ratios = [value / built_in for value, built_in in zip((wall_s, cpu_s), medians["built-in"], strict=True)]
        print(f"| `{plan}` | {name} | {wall_s:.3f} | {ratios[0]:.2f} | {cpu_s:.3f} | {ratios[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
