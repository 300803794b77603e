"""The scripts of examples/ run as they stand: without network, each in seconds."""

import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.helpers.scripts.fork_server import run_forked_workers


@pytest.fixture
def run_example(run_process, run_forked, tmp_path):
    """Run an example of a copy of the checkout, so that what it writes is not left in this one.

    The tutorial's loop and the plans are started as a user starts them. Other runs are `forked`.
    """
    for name in ("examples", "configs", "utils"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_llama3_70b.py", tmp_path)

    def run_copy(*command, forked=False, **variables):
        finished = (run_forked if forked else run_process)(*command, cwd=tmp_path, **variables)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return run_copy


def losses_of(output):
    return [float(loss) for loss in re.findall(r"\| Loss: (\S+)$", output, re.M)]


def test_tutorial_loop_learns_and_saves_a_model_that_loads(run_example, tmp_path):
    output = run_example("python", "examples/tutorial_loop.py")
    losses = losses_of(output)
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]
    assert "[info] Configuration for parallelism is selected." in output
    # The same script continues with what it has saved.
    continued = losses_of(run_example(sys.executable, "examples/tutorial_loop.py", "runs/tutorial", forked=True))
    assert continued[0] == pytest.approx(losses[-1], rel=0.1)


def test_tutorial_loop_has_the_same_losses_on_four_workers(run_example):
    *_, command = (ROOT / "examples" / "four_workers.sh").read_text(encoding="utf-8").splitlines()
    variable, name, *arguments = command.split()
    assert (variable, name) == ("MOREH_WORKERS=4", "python")
    four = run_example(sys.executable, *arguments, forked=True, MOREH_WORKERS="4")
    assert re.search(r"4 workers run the plan '.+'", four)
    one = run_example(sys.executable, "examples/tutorial_loop.py", forked=True)
    assert losses_of(four) == pytest.approx(losses_of(one), rel=1e-2)  # one of them may compute in bfloat16


def test_lora_trains_and_saves_the_adapters_only(run_example, tmp_path):
    losses = losses_of(run_example(sys.executable, "examples/lora.py", forked=True))
    assert losses[-1] < losses[0]
    adapters = load_file(tmp_path / "runs" / "lora" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 2 * 2  # A and B of two projections in two layers
    assert all("lora_" in name for name in adapters)
    trained = [weight for name, weight in adapters.items() if "lora_B" in name]
    assert all(torch.isfinite(weight).all() and weight.any() for weight in trained)  # B begins at 0


def test_plans_are_printed_for_two_accelerators(run_example):
    output = run_example("sh", "examples/plan_only.sh")
    assert re.findall(r"^Accelerator +(\S+) \((\d+) x", output, re.M) == [
        ("8xLarge.4096GB", "64"),
        ("12xLarge.6144GB", "96"),
    ]
    assert re.findall(r"^Step +(\d+) x 1,024 tokens", output, re.M) == ["512", "768"]


def test_traced_step_shows_the_phases_of_stages_and_of_tensor_parallel_ranks(environment, tmp_path):
    """On the four workers of docs/tracing.md; tests/runtime/engine/test_trace.py starts workers by the variable."""
    script = ROOT / "examples" / "traced_step.py"
    first, *others = run_forked_workers([script], 4, cwd=tmp_path, env={**environment, "MOREH_TRACE": "1"})
    assert not any(process.returncode for process in (first, *others)), first.stderr
    assert re.search("4 workers run the plan 'tp2 pp2 dp1 ", first.stdout)
    steps = re.split(r"^step \d\n", first.stdout, flags=re.M)[1:]
    assert len(steps) == 2
    for step in steps:
        spans = set(re.findall(r"trace rank 0: +(\w+) \d+\.\d{3} ms", step))
        assert {"check_inputs", "stage_forward", "forward_backward", "clip_total_norm", "reduce_from_tp"} <= spans
