"""transformers' Trainer on several workers: the losses, evaluation, saved model and checkpoints of a plain process."""

import os
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.compare import max_difference, worst
from tests.helpers.scripts.fork_server import run_forked_workers

pytest.importorskip("accelerate", reason="the Trainer needs it")


@pytest.fixture
def run(run_forked):
    return run_forked


LINE = "torch.moreh.option.enable_advanced_parallelization(mixed_precision=False, distribute_parameter=True)\n"
SCRIPT = """
import sys
import torch
{line}
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=301, max_position_embeddings=128))
rows = [{{"input_ids": row, "labels": row}} for row in torch.randint(0, 301, (32, 32))]


def trainer(**arguments):
    arguments = TrainingArguments(
        "out", per_device_train_batch_size=8, report_to=[], disable_tqdm=True, use_cpu=True, **arguments
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8])


first = trainer(gradient_accumulation_steps=2, max_steps=4, logging_steps=1, save_strategy="no", learning_rate=1e-2)
first.train()
print("evaluated", first.evaluate()["eval_loss"])
first.save_model("saved")
print("saved", flush=True)
"""


def run_script(script, *arguments, workers, env):
    """The completed processes of all ranks."""
    return run_forked_workers([script, *arguments], workers, cwd=script.parent, env=env)


def numbers(console, key):
    """The values that the Trainer has printed; fewer if one of them is not a number."""
    return [float(value) for value in re.findall(rf"'{key}': '?([-+.e\d]+)", console)]


def test_trainer_on_two_workers_trains_as_in_a_plain_process(environment, tmp_path):
    """With sharded parameters."""
    runs = {}
    for name, line, workers in (("plain", "", 1), ("workers", LINE, 2)):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "script.py").write_text(SCRIPT.format(line=line), encoding="utf-8")
        runs[name] = run_script(directory / "script.py", workers=workers, env=environment)[0]
        assert "\nsaved\n" in runs[name].stdout, runs[name].stderr
    plain, workers = runs["plain"].stdout, runs["workers"].stdout
    assert re.search(r"2 workers run the plan '.*dp2.*shard:", workers)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert len(numbers(plain, key)) == 4
        assert numbers(workers, key) == pytest.approx(numbers(plain, key), rel=2e-3)
    evaluated = [float(re.search(r"^evaluated (\S+)", run, re.MULTILINE)[1]) for run in (plain, workers)]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-4)
    saved = [load_file(tmp_path / name / "saved" / "model.safetensors") for name in ("plain", "workers")]
    assert saved[0].keys() == saved[1].keys()
    assert worst(max_difference(saved[0][name], saved[1][name]) for name in saved[0]) < 1e-3


CHECKPOINTS = """
import sys
import torch
{line}
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=301, max_position_embeddings=128))
rows = [{{"input_ids": row, "labels": row}} for row in torch.randint(0, 301, (64, 32))]
arguments = TrainingArguments(
    "out",
    per_device_train_batch_size=8,
    report_to=[],
    disable_tqdm=True,
    max_steps=int(sys.argv[1]),
    save_steps=2,
    save_total_limit=1,
    learning_rate=1e-2,
    adam_epsilon=1e-6,
    lr_scheduler_type="constant",
    {arguments}
)
Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=int(sys.argv[1]) > 2 or None)
print("trained")
"""
STAGES = "torch.moreh.option.enable_advanced_parallelization(mixed_precision=False, num_stages=2)\n"


def train_to_step(directory, *steps, line, workers):
    """Train to each step, each time in new processes; the checkpoint of the last step."""
    (directory / "script.py").write_text(CHECKPOINTS.format(line=line, arguments="use_cpu=True,"), encoding="utf-8")
    for step in steps:
        finished = run_script(directory / "script.py", str(step), workers=workers, env=dict(os.environ))[0]
        assert finished.returncode == 0, finished.stderr
        assert "trained" in finished.stdout
    (checkpoint,) = (directory / "out").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{steps[-1]}"
    return checkpoint


def state_difference(actual, expected):
    """The largest difference of weights and optimizer states that two checkpoints of the Trainer hold."""
    weights = [load_file(directory / "model.safetensors") for directory in (actual, expected)]
    states = [torch.load(directory / "optimizer.pt")["state"] for directory in (actual, expected)]
    flat = [
        {f"{index}/{key}": value for index, values in state.items() for key, value in values.items()}
        for state in states
    ]
    assert weights[0].keys() == weights[1].keys()
    assert flat[0].keys() == flat[1].keys()
    pairs = [(one[name], other[name]) for one, other in (weights, flat) for name in other]
    return worst(max_difference(one, other) for one, other in pairs)


@pytest.mark.parametrize(("line", "workers"), [(LINE, 2), (STAGES, 2)], ids=["sharded", "stages"])
def test_trainer_resumes_from_its_own_checkpoints(line, workers, tmp_path, plain_checkpoint):
    checkpoint = train_to_step(tmp_path, 2, 4, line=line, workers=workers)
    assert state_difference(checkpoint, plain_checkpoint) < 1e-4


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory):
    """That of step 4 without the line and without a stop."""
    return train_to_step(tmp_path_factory.mktemp("plain"), 2, 4, line="", workers=1)


def test_trainer_takes_bfloat16_as_on_a_gpu(run_python, tmp_path):
    line = "torch.moreh.option.enable_advanced_parallelization(mixed_precision=False)"
    finished = run_python(CHECKPOINTS.format(line=line, arguments="bf16=True,"), "2")
    assert finished.returncode == 0, finished.stderr
    assert "trained" in finished.stdout
    assert (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").exists()
