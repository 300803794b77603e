"""Errors of a machine that has too little memory."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from utils.cli import exit_code_of
from utils.machine_errors import dead_loader_text, out_of_memory_text

TOO_MUCH = 1 << 50


def said_of(program, capsys):
    """The exit code of a program, and what standard error has."""
    code = exit_code_of(program, debug=False)
    return code, capsys.readouterr().err


def test_memory_that_the_machine_lacks_is_one_line(capsys):
    code, said = said_of(lambda: torch.empty(TOO_MUCH, dtype=torch.uint8), capsys)
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("error: this machine is out of memory: 1048576.00 GiB more are needed, and ")
    assert "lower train.batch_size" in said
    code, said = said_of(lambda: np.empty(TOO_MUCH, dtype=np.uint8), capsys)
    assert (code, said.count("\n")) == (1, 1)
    assert "1.00 PiB more are needed" in said
    code, said = said_of(lambda: bytearray(1 << 60), capsys)
    assert said.startswith("error: this machine is out of memory: more memory is needed")


def test_memory_of_a_gpu_is_one_line():
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is "
        "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use."
    )
    assert out_of_memory_text(error).startswith(
        "a GPU is out of memory: 2.00 GiB more are needed, and 1.20 GiB are free"
    )


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        exit_code_of(lambda: (_ for _ in ()).throw(RuntimeError("shapes do not match")), debug=False)


class Dies(torch.utils.data.Dataset):
    """Rows whose process dies."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_loader_process_that_dies_is_one_line(capsys):
    code, said = said_of(lambda: list(torch.utils.data.DataLoader(Dies(), num_workers=1)), capsys)
    assert code == 1
    line = said.splitlines()[-1]
    assert line.startswith("error: a process that prepares batches has died (DataLoader worker (pid")
    assert dead_loader_text(RuntimeError("else")) is None


def test_interrupt_while_libraries_are_imported_is_one_word():
    source = (
        "import os, signal\nfrom utils.cli import _leaving_at_interrupt\n"
        "with _leaving_at_interrupt():\n    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    finished = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (130, "interrupted\n")
