"""The soak finds memory, descriptors and threads that grow after the warm-up, and nothing else."""

import pytest

from tests.verify.soak import MIB, Sample, StepCounter, judge

STEPS = range(0, 4000, 50)


def samples(memory=lambda step: 300 * MIB, descriptors=lambda step: 40, threads=lambda step: 9):
    """Samples of one worker."""
    return [Sample("worker 0", step, memory(step), descriptors(step), threads(step)) for step in STEPS]


def warms_up(step):
    """Memory that rises to the quarter of the steps, and then goes up and down."""
    return (200 * MIB if step >= 1000 else 200 * step * MIB // 1000) + step % 3 * MIB


@pytest.mark.parametrize(
    "memory", [lambda step: 300 * MIB, warms_up, lambda step: 300 * MIB + int(0.0009 * step * MIB)]
)
def test_steady_run_passes(memory):
    assert judge(samples(memory), lambda line: None) == []


@pytest.mark.parametrize(
    ("grown", "problem"),
    [
        ({"memory": lambda step: 300 * MIB + int(0.0011 * step * MIB)}, "memory grows by 0.110 MiB in 100 steps"),
        ({"descriptors": lambda step: 40 + step // 3000}, "[40, 41] descriptors"),
        ({"threads": lambda step: 9 + step // 3000}, "[9, 10] threads"),
    ],
)
def test_what_grows_is_named(grown, problem):
    assert judge(samples(**grown), lambda line: None) == [f"worker 0: {problem}"]


def test_descriptor_of_a_moment_is_no_leak():
    assert judge(samples(descriptors=lambda step: 40 + (step == 3500)), lambda line: None) == []


def test_steps_are_counted_by_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    counter = StepCounter(path)
    assert counter.last() == -1
    for lines in range(1, 4):
        with path.open("a") as file:
            file.write("{}\n")
        assert counter.last() == lines - 1
