"""ROUGE of held-out rows, before and after a training."""

import importlib.util

import pytest

from utils.errors import UserError
from utils.training import evaluation

needs_rouge = pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="needs rouge-score")


@needs_rouge
def test_scores_are_means_of_f1():
    from utils.training.rouge import rouge_of_texts, rouge_text

    scores = rouge_of_texts(["the cats sat", "nothing"], ["a cat sat down", "else"])
    # The first: 2 of 3 words and 2 of 4 in common, "cats sat" of 2 and 3 pairs; the second: none.
    assert scores["rouge1"] == pytest.approx((2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2)) / 2)
    assert scores["rouge2"] == pytest.approx((2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)) / 2)
    assert scores["rougeL"] == scores["rouge1"]
    assert (
        rouge_text({"rouge1": 0.5, "rouge2": 0.25, "rougeL": 0.125}) == "ROUGE-1 0.5000, ROUGE-2 0.2500, ROUGE-L 0.1250"
    )


@needs_rouge
def test_run_has_scores_of_the_first_and_the_last_step(train, read_metrics, monkeypatch, capsys):
    written = []

    def generate(model, prompt_ids, tokenizer, max_new_tokens, *, is_drawn=True):
        text = "    return x + 1" if not is_drawn else "a sample"
        written.append((is_drawn, max_new_tokens))
        return text

    monkeypatch.setattr(evaluation, "generate_sample", generate)
    directory = train("log.rouge_rows=3", "log.eval_every_steps=2")
    lines = read_metrics(directory)
    assert [line["step"] for line in lines if "rougeL" in line] == [0, 4]
    assert 0 < lines[0]["rouge2"] <= lines[0]["rougeL"] <= 1
    assert lines[4]["rougeL"] == lines[0]["rougeL"]
    output = capsys.readouterr().out
    assert output.count(" | ROUGE-1 0.") == 2
    assert sum(not is_drawn for is_drawn, _ in written) == 2 * 3
    assert len({length for is_drawn, length in written if not is_drawn}) == 1
    assert "<b>ROUGE</b>" in (directory / "report.html").read_text(encoding="utf-8")


def test_package_that_is_not_installed_is_named(train, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^log\.rouge_rows: the package rouge-score is .*: pip install rouge-score$"):
        train("log.rouge_rows=3")


@needs_rouge
def test_responses_of_likely_tokens_are_not_drawn(train, monkeypatch):
    """The model's own generation, with the arguments that transformers takes without a warning."""
    calls = []
    real = evaluation.generate_sample

    def generate(model, *arguments, **options):
        first, second = (real(model, *arguments, **options) for _ in range(2))
        assert first == second
        calls.append(options)
        return first

    monkeypatch.setattr(evaluation, "generate_sample", generate)
    train("log.rouge_rows=2", "train.steps=1", "log.sample_tokens=0")
    assert calls == [{"is_drawn": False}] * 4
