"""Text of other processes reaches a terminal without what it would obey, and cut."""

import json
import os

import psutil
import pytest

from moreh.accelerator import registry as r
from moreh.accelerator.job_status import CpuSample, JobStatus, write_status
from moreh.accelerator.waiting import warn_of_waiting
from moreh.cli import smi
from moreh.console.printable import COMMAND_CHARACTERS, in_one_line, printable
from moreh.errors import AcceleratorBusyError

HOSTILE = "python \x1b]0;title\x07\x1b[2Jtrain.py \u202e" + "x" * 5000


def test_text_in_one_line():
    assert in_one_line("a\nb\x1b[31m\udc80é") == "a?b?[31m?é"
    assert len(in_one_line("x" * 5000)) == COMMAND_CHARACTERS
    assert in_one_line("x" * COMMAND_CHARACTERS) == "x" * COMMAND_CHARACTERS
    assert printable("a\n\x07", kept="\n") == "a\n?"


@pytest.fixture
def hostile_job(state_directory, monkeypatch):
    """A job of a process whose command line is hostile."""
    job, _ = r.start_job(psutil.Process(os.getppid()), HOSTILE)
    write_status(job, JobStatus({"weights": 1}, True, 1, CpuSample(0, 0), CpuSample(1, 0)))
    monkeypatch.setattr(psutil.Process, "terminate", lambda self: None)
    monkeypatch.setattr(smi, "_ends_within", lambda seconds, job: True)


@pytest.mark.usefixtures("hostile_job")
@pytest.mark.parametrize("options", [[], ["-p"], ["--reset"], ["device", "--rm", "0"]])
def test_command_of_another_process_is_cleaned_and_cut(options, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["moreh-smi", *options])
    smi.main()
    out, err = capsys.readouterr()
    text = (out + err).replace("\n", "")
    assert "python ?]0;title" in text
    assert text.isprintable()
    assert "x" * 100 not in text


@pytest.mark.usefixtures("hostile_job")
def test_refusal_and_waiting_are_cleaned_and_cut(caplog):
    with pytest.raises(AcceleratorBusyError) as caught:
        r.start_job(psutil.Process(), "python")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    with caplog.at_level("WARNING", logger="moreh"):
        warn_of_waiting(AcceleratorBusyError(f"accelerator 0 is in use by {HOSTILE[:60]}"))


@pytest.mark.usefixtures("hostile_job")
def test_json_has_the_command_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["moreh-smi", "--json"])
    assert smi.main() == 0
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert json.loads(out)["accelerators"][0]["processes"][0]["command"] == HOSTILE
