"""transformers' Trainer on several workers: the losses, the evaluation and the saved model of a plain process."""

import re

import pytest
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
if len(sys.argv) > 1:
    trainer(max_steps=2, save_steps=1).train()
"""


def run_script(script, *arguments, workers, env):
    """The completed processes of all ranks."""
    return run_forked_workers([script, *arguments], workers, cwd=script.parent, env=env)


def numbers(console, key):
    """The values that the Trainer has printed; fewer if one of them is not a number."""
    return [float(value) for value in re.findall(rf"'{key}': '?([-+.e\d]+)", console)]


def test_trainer_on_two_workers_trains_as_in_a_plain_process(environment, tmp_path):
    """With sharded parameters. Checkpoints of the Trainer itself are refused by an error that says how to save."""
    runs = {}
    for name, line, workers, arguments in (("plain", "", 1, []), ("workers", LINE, 2, ["with checkpoints"])):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "script.py").write_text(SCRIPT.format(line=line), encoding="utf-8")
        runs[name] = run_script(directory / "script.py", *arguments, workers=workers, env=environment)[0]
        assert "\nsaved\n" in runs[name].stdout, runs[name].stderr
    plain, workers = runs["plain"].stdout, runs["workers"].stdout
    assert re.search(r"2 workers carry out the plan '.*dp2.*shard:", workers)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert len(numbers(plain, key)) == 4
        assert numbers(workers, key) == pytest.approx(numbers(plain, key), rel=2e-3)
    evaluated = [float(re.search(r"^evaluated (\S+)", run, re.MULTILINE)[1]) for run in (plain, workers)]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-4)
    saved = [load_file(tmp_path / name / "saved" / "model.safetensors") for name in ("plain", "workers")]
    assert saved[0].keys() == saved[1].keys()
    assert worst(max_difference(saved[0][name], saved[1][name]) for name in saved[0]) < 1e-3

    assert runs["plain"].returncode == 0
    assert runs["workers"].returncode != 0
    assert 'save_strategy="no" and trainer.save_model()' in runs["workers"].stderr


CHECKPOINTS = """
import torch
torch.moreh.option.enable_advanced_parallelization(mixed_precision=False)
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=301, max_position_embeddings=128))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 301, (32, 32))]
arguments = TrainingArguments(
    "out", per_device_train_batch_size=8, report_to=[], disable_tqdm=True, max_steps=2, save_steps=1, bf16=True
)
Trainer(model, arguments, train_dataset=rows).train()
print("trained")
"""


def test_trainer_of_a_first_model_does_not_save_half_of_the_optimizer(environment, tmp_path):
    (tmp_path / "script.py").write_text(CHECKPOINTS.replace(", bf16=True", ""), encoding="utf-8")
    finished = run_script(tmp_path / "script.py", workers=2, env=environment)[0]
    assert finished.returncode != 0
    assert 'save_strategy="no" and trainer.save_model()' in finished.stderr
    assert "trained" not in finished.stdout


def test_trainer_takes_bfloat16_as_on_a_gpu(run_python, tmp_path):
    finished = run_python(CHECKPOINTS)
    assert finished.returncode == 0, finished.stderr
    assert "trained" in finished.stdout
    assert (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").exists()
