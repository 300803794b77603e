"""train_gpt.py from its settings to the saved model: the files of a run, its task, and its weights in the end."""

import itertools
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import train_gpt
from tests.helpers.scripts.tiny_runs import prepare
from utils.config.schema import DataSection
from utils.config.yaml_file import load_config
from utils.data.batches import training_loader
from utils.data.encoding import read_rows
from utils.data.records import Record
from utils.logging.run_log import METRIC_KEYS
from utils.training.lr_schedule import lr_factor
from utils.training.model import load_model


def test_run_leaves_the_documented_files(train, read_metrics, capsys):
    directory = train("log.eval_every_steps=2")
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "model",
        "report.html",
        "run.json",
        "train.log",
    ]
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    } <= {path.name for path in (directory / "model").iterdir()}
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))["train"]["lr"] == 1e-3

    lines = read_metrics(directory)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert set(lines[0]) == {"step", "eval_loss"}
    keys = set(METRIC_KEYS) - {"examples_passed"}  # of log.example_functions
    assert set(lines[1]) == keys - {"eval_loss"}
    assert set(lines[2]) == set(lines[4]) == keys
    assert lines[4]["eval_loss"] < lines[0]["eval_loss"]
    assert all(math.isfinite(value) for line in lines for value in line.values())

    output = capsys.readouterr().out
    assert re.search(
        r"^\[Step 2/4\] 50% \| Loss: \d+\.\d+ \| lr \d\.\de-\d\d \| norm \d+\.\d\d \| [\d,]+ tokens/s \| "
        r"\d+\.\d GiB \| \d+ s left$",
        output,
        re.M,
    )
    assert len(re.findall(r"^\[Step [024]/4\] \| Held-out loss: ", output, re.M)) == 3
    assert output.count("Sample:\n") == 3
    log = (directory / "train.log").read_text(encoding="utf-8")
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ \[Step 4/4\] 100% \| Loss: ", log, re.M)


def test_task_is_to_write_a_body_from_signature_and_docstring():
    signature, body = 'def add(a, b):\n    """Add."""\n', "    return a + b\n"
    record = Record("here", {"prompt": signature, "response": body})
    data = DataSection(docstrings=["stdlib"])
    assert train_gpt.make_pair(record, data) == (signature, body)
    assert train_gpt.make_example([5, 6], [7], 0, "response") == ([5, 6, 7, 0], [-100, -100, 7, 0])
    assert train_gpt.make_example([5, 6], [7], 0, "all") == ([5, 6, 7, 0], [5, 6, 7, 0])
    assert train_gpt.show_sample(signature, "    return 1", body) == f"{signature}>>>\n    return 1"


def test_sample_ends_at_the_models_last_position(train):
    train("train.steps=1", "log.sample_tokens=500")
    train("train.steps=1", "log.sample_tokens=0")


REFERENCE_SETTINGS = {
    "as given": [],
    "weight decay": ["train.weight_decay=0.5"],
    "clipping": ["train.max_grad_norm=0.05"],
    "schedule": ["train.schedule=linear", "train.warmup_steps=3"],
    "seed": ["train.seed=5"],
    "loss on all": ["data.loss_on=all"],
}


def _reference_weights(config):
    """The weights after the run written again by hand: one row at a time, so without padding, masks or labels."""
    torch.manual_seed(config.train.seed)
    data = prepare(config)
    loader = training_loader(data, config)
    row_at = {row["location"]: row for row in data.train}
    model = load_model(config, data.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.train.weight_decay)
    for step, batch in enumerate(itertools.islice(itertools.chain(loader, loader), config.train.steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = config.train.lr * lr_factor(step, config.train.steps, config.train)
        loss_sum, count = 0.0, 0
        for row in (row_at[location] for location in batch["locations"]):
            ids = torch.tensor([row["input_ids"]])
            log_probs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            first = max(row["prompt_length"], 1) if config.data.loss_on == "response" else 1
            chosen = log_probs.gather(1, ids[0, 1:, None])[first - 1 :]
            loss_sum, count = loss_sum - chosen.sum(), count + len(chosen)
        (loss_sum / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.fixture(scope="module")
def reference_results():
    return []


@pytest.mark.parametrize("case", REFERENCE_SETTINGS)
def test_weights_are_those_of_a_loop_written_by_hand(train, tiny_config, case, reference_results):
    overrides = ["train.steps=6", *REFERENCE_SETTINGS[case]]
    trained = load_file(train(*overrides) / "model" / "model.safetensors")
    expected = _reference_weights(load_config(str(tiny_config), overrides))
    assert expected.keys() == trained.keys()
    for name, weight in expected.items():
        assert torch.allclose(trained[name], weight, rtol=1e-3, atol=2e-6), name
    # Each setting matters: no two of these runs end with the same weights.
    weight = trained["transformer.h.0.mlp.c_fc.weight"]
    assert not any(
        w.shape == weight.shape and torch.allclose(w, weight, rtol=1e-3, atol=2e-6) for w in reference_results
    )
    reference_results.append(weight)


def test_same_settings_give_the_same_bits(train):
    weights = [_weights(train()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def _weights(directory):
    return list(load_file(directory / "model" / "model.safetensors").values())


def test_saved_model_loads_without_this_package(train, run, tmp_path):
    """Plain transformers gives the same loss; torch's autoload is off, so that nothing of this package is imported."""
    directory = train("log.eval_batch_size=8")
    eval_loss = json.loads((directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["eval_loss"]
    source = """
import sys, torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] + "/model")
rows = load_from_disk(sys.argv[2])
losses, count = 0.0, 0
for row in rows:
    ids = torch.tensor([row["input_ids"]])
    labels = ids.clone()
    labels[:, :row["prompt_length"]] = -100
    n = int((labels[:, 1:] != -100).sum())
    losses, count = losses + model(ids, labels=labels).loss.item() * n, count + n
assert "moreh" not in sys.modules and not hasattr(torch, "moreh")
print(losses / count, repr(tokenizer.decode(tokenizer("def f(x):")["input_ids"])))
"""
    script = tmp_path / "plain.py"
    script.write_text(source, encoding="utf-8")
    (cache,) = (directory.parent / "cache").glob("data-*")
    rows = tmp_path / "evaluation"
    read_rows(cache).select(np.load(cache / "evaluation.npy")).save_to_disk(str(rows))
    finished = run(sys.executable, script, directory, rows, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert finished.returncode == 0, finished.stderr
    loss, text = finished.stdout.split(" ", 1)
    assert float(loss) == pytest.approx(eval_loss, abs=1e-4)
    assert text == "'def f(x):'\n"


def test_pretrained_model_is_fine_tuned_with_its_own_tokenizer(train, tmp_path, read_metrics):
    saved = train("run.name=first").with_name("first") / "model"
    directory = train(f"model={{pretrained: {saved}}}", "tokenizer={}")
    first, second = read_metrics(tmp_path / "runs" / "first"), read_metrics(directory)
    assert second[0]["eval_loss"] == pytest.approx(first[-1]["eval_loss"], rel=1e-6)
