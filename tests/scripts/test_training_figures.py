"""The figures of a training are free of mistakes that are common elsewhere.

- a mean of means over batches
- an evaluation loss that depends on its batch size
- evaluation that changes the training
- a non-finite step that is passed over
- throughput that counts padding
"""

import math
import re

import numpy as np
import pytest

import train_gpt
import utils.training.evaluation
from tests.helpers.compare import curve_difference
from utils.data.encoding import read_rows
from utils.errors import UserError

CUTS = [
    ["train.batch_size=8"],
    ["train.batch_size=4", "train.gradient_accumulation=2"],
    ["train.batch_size=2", "train.gradient_accumulation=4"],
]


def _losses_and_norms(lines):
    return [line[key] for line in lines for key in ("loss", "grad_norm", "eval_loss") if key in line]


def test_gradient_does_not_depend_on_how_the_rows_are_cut(train, read_metrics):
    runs = [_losses_and_norms(read_metrics(train(*cut, "data.loss_on=response"))) for cut in CUTS]
    assert curve_difference(runs[1], runs[0]) < 1e-5
    assert curve_difference(runs[2], runs[0]) < 1e-5


def test_mean_of_means_would_be_seen(train, read_metrics, monkeypatch):
    """The same comparison on the mistaken version, where each batch of a step weighs the same, fails."""
    expected = _losses_and_norms(read_metrics(train(*CUTS[0])))
    monkeypatch.setattr(train_gpt, "count_labels", lambda labels: 1)
    mistaken = _losses_and_norms(read_metrics(train(*CUTS[2])))
    assert 1e-3 < curve_difference(mistaken, expected) < math.inf


def test_evaluation_does_not_depend_on_its_batch_size(train, read_metrics, monkeypatch):
    def held_out_losses(batch_size):
        lines = read_metrics(train(f"log.eval_batch_size={batch_size}"))
        return [line["eval_loss"] for line in lines if "eval_loss" in line]

    expected = held_out_losses(8)
    assert curve_difference(held_out_losses(1), expected) < 1e-6
    assert curve_difference(held_out_losses(3), expected) < 1e-6
    # The mistaken version: a mean of means.
    monkeypatch.setattr(utils.training.evaluation, "count_labels", lambda labels: 1)
    assert 1e-4 < curve_difference(held_out_losses(3), expected) < math.inf


def test_evaluation_and_sampling_do_not_change_training(train, read_metrics):
    dropout = "model.architecture.resid_pdrop=0.2"
    rare = [line["loss"] for line in read_metrics(train(dropout)) if "loss" in line]
    often = [line["loss"] for line in read_metrics(train(dropout, "log.eval_every_steps=1")) if "loss" in line]
    assert rare == often


def test_non_finite_loss_stops_the_run_and_names_the_rows(train, read_metrics, tmp_path):
    with pytest.raises(UserError, match=r"step 2: the loss is nan and the gradient norm nan\. .*train\.log"):
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
    (cache,) = (directory.parent / "cache").glob("data-*")
    rows = read_rows(cache).select(np.load(cache / "train.npy"))
    assert len(lines) == 4  # 32 rows in batches of 8: one epoch uses each of them once
    real = sum(len(row["input_ids"]) for row in rows)
    label = sum(len(row["input_ids"]) - row["prompt_length"] for row in rows)
    steps = [(line["real_tokens_per_s"], line["label_tokens_per_s"], line["padded_tokens_per_s"]) for line in lines]
    # Each step has 8 x 48 padded tokens, which gives back its duration.
    seconds = [8 * 48 / padded for _, _, padded in steps]
    assert sum(r * s for (r, _, _), s in zip(steps, seconds, strict=True)) == pytest.approx(real)
    assert sum(n * s for (_, n, _), s in zip(steps, seconds, strict=True)) == pytest.approx(label)
    assert real < 32 * 48  # padding was there to be counted


def test_non_finite_evaluation_saves_no_model(train, tmp_path):
    with pytest.raises(UserError, match="held-out loss is nan"):
        train("train.steps=1", "train.lr=1e30", "log.sample_tokens=0")
    assert not (tmp_path / "runs" / "tiny" / "model").exists()
