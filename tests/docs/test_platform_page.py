"""What docs/coming-from-the-platform.md says of current libraries: old words fail, and the page's work."""

import inspect
import pickle
import re

import pytest
import torch

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "coming-from-the-platform.md").read_text(encoding="utf-8")


def words_of_row(text):
    """The code in the row of the page whose first cell has a text: the script's, and what to write instead."""
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| ") and text in line.split(" | ")[0]]
    return [re.findall(r"`(.+?)`", cell) for cell in row.split(" | ")]


def test_adamw_is_torchs():
    (before,), (after,) = words_of_row("import AdamW")
    with pytest.raises(ImportError):
        exec(before)
    exec(after)


def test_losses_are_added_up_as_numbers():
    before, after = words_of_row("+= loss")
    loss = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(RuntimeError, match="can't be cast"):
        exec("\n".join(before), {"torch": torch, "loss": loss})
    names = {"loss": loss}
    exec("\n".join(after), names)
    assert names["total"] == 0.5


def test_trainer_takes_a_tokenizer_by_another_name():
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    from transformers import Trainer

    assert words_of_row("Trainer(tokenizer") == [
        ["Trainer(tokenizer=tokenizer)"],
        ["Trainer(processing_class=tokenizer)"],
    ]
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokenizer'"):
        Trainer(tokenizer=None)
    assert "processing_class" in inspect.signature(Trainer.__init__).parameters


def test_saved_data_set_is_loaded_where_the_file_is_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.utils.data.TensorDataset(torch.arange(3)), "data.pt")
    (before,), (after,) = words_of_row("torch.load")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        eval(before)
    assert len(eval(after)) == 3


def test_tf32_is_refused_by_transformers_itself(tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    from transformers import TrainingArguments

    assert "`TrainingArguments(tf32=True)` is refused by transformers itself" in PAGE
    with pytest.raises(ValueError, match="--tf32 requires"):
        TrainingArguments(str(tmp_path), tf32=True, report_to=[])
