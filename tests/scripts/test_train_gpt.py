"""train_gpt.py from its settings to the saved model: what it leaves, and that the mistakes of the field are not in it.

The mistakes: a mean of means over batches, an evaluation loss that depends on its batch size, a non-finite step that is
passed over, throughput that counts padding, a progress bar and figures on one line, a first step that does not learn.
"""

import fcntl
import itertools
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
import yaml

import train_gpt
import utils.training.evaluation
from tests.conftest import ROOT
from utils.config.yaml_file import load_config
from utils.data.batches import training_loader
from utils.data.dataset import prepare_data
from utils.errors import UserError
from utils.logging.run_log import METRIC_KEYS
from utils.training.lr_schedule import learning_rate_factor
from utils.training.model import load_model


def test_run_leaves_the_documented_files(train, read_metrics, capsys):
    directory = train("log.eval_every_steps=2")
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "model",
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
    assert set(lines[1]) == set(METRIC_KEYS) - {"eval_loss"}
    assert set(lines[2]) == set(lines[4]) == set(METRIC_KEYS)
    assert lines[4]["eval_loss"] < lines[0]["eval_loss"]
    assert all(math.isfinite(value) for line in lines for value in line.values())

    said = capsys.readouterr().out
    assert re.search(
        r"^\[Step 2/4\] \| Loss: \d+\.\d+ \| Duration: \d+\.\d\d sec \| Throughput: \d+\.\d\d tokens/sec$", said, re.M
    )
    assert len(re.findall(r"^\[Step [024]/4\] \| Held-out loss: ", said, re.M)) == 3
    assert said.count("Sample:\n") == 3
    log = (directory / "train.log").read_text(encoding="utf-8")
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ \[Step 4/4\] \| Loss: ", log, re.M)


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
    """The run written again by hand: one row at a time without padding, so without masks, and torch's own functions."""
    torch.manual_seed(config.train.seed)
    data = prepare_data(config, lambda _: None)
    loader = training_loader(data.train, data.tokenizer, config)
    by_place = {row["place"]: row for row in data.train}
    model = load_model(config, data.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.train.weight_decay)
    for step, batch in enumerate(itertools.islice(itertools.chain(loader, loader), config.train.steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = config.train.lr * learning_rate_factor(step, config.train.steps, config.train)
        loss_sum, count = 0.0, 0
        for row in (by_place[place] for place in batch["places"]):
            ids = torch.tensor([row["input_ids"]])
            scores = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            first = max(row["prompt_length"], 1) if config.data.loss_on == "response" else 1
            chosen = scores.gather(1, ids[0, 1:, None])[first - 1 :]
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
    from safetensors.torch import load_file

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


def test_failed_start_leaves_an_earlier_run_alone(train, read_metrics):
    directory = train("train.steps=1")
    with pytest.raises(UserError):
        train("data.response_field=nope")
    assert len(read_metrics(directory)) == 2
    assert not directory.with_name("tiny.1").exists()


def test_second_run_of_a_name_that_is_being_written_is_refused(train, tmp_path):
    from filelock import FileLock

    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / ".tiny.lock"), pytest.raises(UserError, match="another run is writing"):
        train()
    train()


def test_non_finite_evaluation_saves_no_model(train, tmp_path):
    with pytest.raises(UserError, match="held-out loss is nan"):
        train("train.steps=1", "train.lr=1e30", "log.sample_tokens=0")
    assert not (tmp_path / "runs" / "tiny" / "model").exists()


def test_reader_that_is_gone_does_not_end_the_training(environment, tiny_config, tmp_path):
    command = f"{sys.executable} train_gpt.py --config {tiny_config} | head -1"
    subprocess.run(command, shell=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    assert (tmp_path / "runs" / "tiny" / "model" / "model.safetensors").exists()


def test_interrupt_ends_the_run_at_any_time(environment, tiny_config, tmp_path):
    """Ctrl-C mostly arrives in a backward pass, where Python's exceptions have nowhere to go."""
    command = [sys.executable, "train_gpt.py", "--config", str(tiny_config), "train.steps=100000", "log.every_steps=1"]
    for delay in (0.0, 0.013, 0.029):
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert any(line.startswith("[Step 5/") for line in process.stdout)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors == "interrupted\n"
    assert "the run ended with KeyboardInterrupt" in (tmp_path / "runs" / "tiny" / "train.log").read_text(
        encoding="utf-8"
    )


def test_earlier_run_of_the_same_name_is_kept(train):
    directory = train("train.steps=1")
    first = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    train("train.steps=1")
    assert (directory.with_name("tiny.1") / "metrics.jsonl").read_text(encoding="utf-8") == first


def test_same_settings_give_the_same_bits(train):
    weights = [_weights(train()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def _weights(directory):
    from safetensors.torch import load_file

    return list(load_file(directory / "model" / "model.safetensors").values())


CUTS = [
    ["train.batch_size=8"],
    ["train.batch_size=4", "train.gradient_accumulation=2"],
    ["train.batch_size=2", "train.gradient_accumulation=4"],
]


def _losses_and_norms(lines):
    return [line[key] for line in lines for key in ("loss", "grad_norm", "eval_loss") if key in line]


def test_gradient_does_not_depend_on_how_the_rows_are_cut(train, read_metrics):
    runs = [_losses_and_norms(read_metrics(train(*cut, "data.loss_on=response"))) for cut in CUTS]
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert runs[2] == pytest.approx(runs[0], rel=1e-5)


def test_mean_of_means_would_be_seen(train, read_metrics, monkeypatch):
    """The same comparison on the mistaken version, where each batch of a step weighs the same, fails."""
    expected = _losses_and_norms(read_metrics(train(*CUTS[0])))
    monkeypatch.setattr(train_gpt, "count_labels", lambda labels: 1)
    mistaken = _losses_and_norms(read_metrics(train(*CUTS[2])))
    assert mistaken != pytest.approx(expected, rel=1e-3)


def test_evaluation_does_not_depend_on_its_batch_size(train, read_metrics, monkeypatch):
    def held_out_losses(batch_size):
        return [
            line["eval_loss"]
            for line in read_metrics(train(f"log.eval_batch_size={batch_size}"))
            if "eval_loss" in line
        ]

    expected = held_out_losses(8)
    assert held_out_losses(1) == pytest.approx(expected, rel=1e-6)
    assert held_out_losses(3) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(
        utils.training.evaluation, "count_labels", lambda labels: 1
    )  # the mistaken version: a mean of means
    assert held_out_losses(3) != pytest.approx(expected, rel=1e-4)


def test_evaluation_and_sampling_do_not_change_training(train, read_metrics):
    dropout = "model.architecture.resid_pdrop=0.2"
    rare = [line["loss"] for line in read_metrics(train(dropout)) if "loss" in line]
    often = [line["loss"] for line in read_metrics(train(dropout, "log.eval_every_steps=1")) if "loss" in line]
    assert rare == often


def test_non_finite_loss_stops_the_run_and_names_the_rows(train, read_metrics, tmp_path):
    with pytest.raises(UserError, match=r"step 2: the loss is nan and the gradient norm nan; .*train\.log"):
        train("train.lr=1e30", "train.max_grad_norm=1e30")
    directory = tmp_path / "runs" / "tiny"
    assert [line["step"] for line in read_metrics(directory)] == [0, 1]  # and no step with a loss of 0
    log = (directory / "train.log").read_text(encoding="utf-8")
    step = re.search(r"\[Step 2/4\] \| Loss: nan \| Gradient norm: nan \| Rows: (.*)", log)
    assert len(re.findall(r"pairs\.jsonl:\d+", step[1])) == 8
    assert not (directory / "model").exists()
    assert "Traceback" in log  # for whoever wants to see it


def test_throughput_counts_real_tokens(train, read_metrics):
    directory = train("train.epochs=1", "train.steps=null", "data.loss_on=response")
    lines = read_metrics(directory)[1:]
    from datasets import load_from_disk

    (cache,) = (directory.parent / "cache").glob("data-*")
    rows = load_from_disk(str(cache / "train"))
    assert len(lines) == 4  # 32 rows in batches of 8: one epoch uses each of them once
    real = sum(len(row["input_ids"]) for row in rows)
    label = sum(len(row["input_ids"]) - row["prompt_length"] for row in rows)
    steps = [(line["real_tokens_per_s"], line["label_tokens_per_s"], line["padded_tokens_per_s"]) for line in lines]
    # Each step has 8 x 48 padded tokens, which gives back its duration.
    seconds = [8 * 48 / padded for _, _, padded in steps]
    assert sum(r * s for (r, _, _), s in zip(steps, seconds, strict=True)) == pytest.approx(real)
    assert sum(n * s for (_, n, _), s in zip(steps, seconds, strict=True)) == pytest.approx(label)
    assert real < 32 * 48


def test_output_to_a_file_is_plain_lines(run, tiny_config, tmp_path):
    """No progress bar, no carriage return, each figure on a line of its own; the hook is on, as by default."""
    finished = run(
        sys.executable,
        "train_gpt.py",
        "--config",
        tiny_config,
        "accelerator.advanced_parallelization={}",
        "log.every_steps=1",
    )
    assert finished.returncode == 0, finished.stderr
    assert "\r" not in finished.stdout + finished.stderr
    step_line = r"^\[Step \d/4\] \| Loss: [^|]* \| Duration: [^|]* sec \| Throughput: [^|]* tokens/sec$"
    assert len(re.findall(step_line, finished.stdout, re.M)) == 4
    assert "[info] MoAI Accelerator is ready to use." in finished.stdout
    assert (
        len(
            re.findall(
                r"^\[info\] num_stages : \d+, num_micro_batches : \d+, batch_per_device : ", finished.stdout, re.M
            )
        )
        == 1
    )
    assert re.search(
        r"This machine: 1 worker, micro-batches of at most \d+ tokens, recomputation : none", finished.stdout
    )
    assert finished.stderr == ""
    log = (tmp_path / "runs" / "tiny" / "train.log").read_text(encoding="utf-8")
    assert " [info] MoAI Accelerator is ready to use.\n" in log


def test_progress_bar_on_a_terminal(environment, tiny_config):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "train_gpt.py", "--config", str(tiny_config), "log.every_steps=1"],
        env=environment, stdout=follower, stderr=follower, stdin=follower,
    )  # fmt: skip
    os.close(follower)
    text = b""
    try:
        while chunk := os.read(leader, 65536):
            text += chunk
    except OSError:  # the terminal's other end is closed
        pass
    assert process.wait() == 0
    assert b"training: " in text
    assert b"\r[Step 1/4] | Loss: " in text or b"\n[Step 1/4] | Loss: " in text


def test_saved_model_loads_without_this_package(train, run, tmp_path):
    """Plain transformers, with torch's autoload off so that nothing of this package is imported, gives the same loss."""
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
    finished = run(
        sys.executable, script, directory, cache / "evaluation", cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0"
    )
    assert finished.returncode == 0, finished.stderr
    loss, text = finished.stdout.split(" ", 1)
    assert float(loss) == pytest.approx(eval_loss, abs=1e-4)
    assert text == "'def f(x):'\n"


def test_pretrained_model_is_fine_tuned_with_its_own_tokenizer(train, tmp_path, read_metrics):
    saved = train("run.name=first").with_name("first") / "model"
    directory = train(f"model={{pretrained: {saved}}}", "tokenizer={}")
    first, second = read_metrics(tmp_path / "runs" / "first"), read_metrics(directory)
    assert second[0]["eval_loss"] == pytest.approx(first[-1]["eval_loss"], rel=1e-6)


def test_tensorboard_is_an_option(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(train("run.tensorboard=true") / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval_loss")] == [0, 4]


def test_accelerator_model_of_the_settings_is_switched_to(run, tiny_config):
    finished = run(
        sys.executable, "train_gpt.py", "--config", tiny_config, "accelerator.model=4xLarge.2048GB", "train.steps=1"
    )
    assert "4xLarge.2048GB (32 x MI250 GCD, 2096640 MiB)" in finished.stdout
    assert "4xLarge.2048GB  *" in run("moreh-switch-model", input="q\n").stdout
