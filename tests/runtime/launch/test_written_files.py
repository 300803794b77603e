"""Files that several workers write, in the order in which the workers come to them."""

import gc
import io
import json
import os
import pickle
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from torch.distributed import DistNetworkError, HashStore

from moreh.runtime.launch import written_files
from moreh.runtime.launch.script_files import _make_open
from moreh.runtime.launch.shared_calls import SharedCalls


@pytest.fixture
def openers(monkeypatch):
    """`open` of three workers. None waits for long."""
    monkeypatch.setattr(written_files, "PATIENCE", timedelta(milliseconds=100))
    store = HashStore()
    return [_make_open(rank, SharedCalls(store), open, one_machine=True) for rank in range(3)]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("mode", ["w", "wb", "w+", "w+b"])
def test_file_is_complete_for_each_worker_that_has_written_it(openers, tmp_path, order, mode):
    """The workers come one after another; each reads what it has written, twice."""
    path = tmp_path / "file"
    for text in ("first, longer", "second"):
        for rank in order:
            with openers[rank](path, mode) as file:
                file.write(text.encode() if "b" in mode else text)
                assert file.name == os.fspath(path)
                if "+" in mode:
                    file.seek(0)
                    assert len(file.read()) == len(text)
            assert path.read_text() == text
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_late_worker_does_not_empty_what_a_fast_one_reads(openers, tmp_path):
    for fast, slow in ((1, 0), (0, 1), (2, 1)):
        path = tmp_path / f"{fast}{slow}"
        with openers[fast](path, "w") as file:
            file.write(f"{fast}")
        late = openers[slow](path, "w")
        assert path.read_text() == f"{fast}"
        late.write(f"{slow}")
        late.close()
        assert path.read_text() == f"{slow}"


def test_workers_that_write_in_turns_write_over_each_other(openers, tmp_path):
    """As processes do: the last one's text stays."""
    path = tmp_path / "file"
    for rank in (0, 2, 1):
        with openers[rank](path, "w") as file:
            file.write(f"of {rank}")
        assert path.read_text() == f"of {rank}"


def test_lines_that_only_worker_0_writes_are_there_at_once(openers, tmp_path):
    """A log that each worker opens and keeps open, whoever opens it first."""
    path = tmp_path / "train.log"
    logs = {rank: openers[rank](path, "w") for rank in (1, 0, 2)}
    for line in ("one", "two"):
        print(line, file=logs[0], flush=True)
        assert path.read_text().splitlines()[-1] == line
    for log in logs.values():
        log.close()
    assert path.read_text() == "one\ntwo\n"


def test_file_of_one_worker_is_its_own(openers, tmp_path):
    path = tmp_path / "rank-2.txt"
    file = openers[2](path, "w")
    file.write("line")
    file.flush()
    assert path.read_text() == "line"
    file.close()
    file.close()
    assert path.read_text() == "line"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_file_that_is_not_closed_by_hand(openers, tmp_path, order):
    path = tmp_path / "values.json"
    gc.disable()
    try:
        for rank in order:
            json.dump([1, 2], openers[rank](path, "w"))
            assert json.loads(path.read_text()) == [1, 2]
    finally:
        gc.enable()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_libraries_write_through_it(openers, tmp_path, order, monkeypatch):
    for rank in order:
        monkeypatch.setattr(io, "open", openers[rank])
        monkeypatch.setattr("builtins.open", openers[rank])
        np.savez(tmp_path / "arrays.npz", a=np.arange(5))
        np.save(tmp_path / "array.npy", np.arange(5))
        Path(tmp_path / "text.txt").write_text("text")
        with (tmp_path / "pickled").open("wb", buffering=0) as file:
            pickle.dump({"step": 1}, file)
        assert np.load(tmp_path / "arrays.npz")["a"].tolist() == np.load(tmp_path / "array.npy").tolist() == [*range(5)]
        assert (tmp_path / "text.txt").read_text() == "text"
        with (tmp_path / "pickled").open("rb") as file:
            assert pickle.load(file) == {"step": 1}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_error_of_opening_is_an_error_of_each_worker(openers, tmp_path, order):
    for rank in order:
        with pytest.raises(FileNotFoundError, match="none"):
            openers[rank](tmp_path / "none" / "file", "w")
        with pytest.raises(IsADirectoryError):
            openers[rank](tmp_path, "w")


@pytest.mark.parametrize(
    ("mode", "arguments"),
    [
        ("w", {}),
        ("w", {"encoding": "utf-16", "newline": "\r\n", "buffering": 1}),
        ("wb", {}),
        ("wb", {"buffering": 0}),
        ("w+b", {}),
    ],
)
def test_discarded_file_has_the_positions_of_a_file(openers, tmp_path, mode, arguments):
    found = []
    files = [openers[rank](tmp_path / "file", mode, **arguments) for rank in (1, 0, 2)]
    for file in files:
        with file:
            line = "line\n" if mode == "w" else b"line\n"
            written = [file.write(line), file.write(line), file.tell()]
            file.flush()
            assert file.fileno() > 2
            positions = [file.seek(2), file.tell(), file.seek(0, os.SEEK_END), file.seekable(), file.truncate(7)]
            found.append([*written, *positions, file.seek(0, os.SEEK_END), file.readable(), file.writable(), file.mode])
    assert found[0] == found[1] == found[2]
    with pytest.raises(ValueError, match="invalid mode"):
        openers[1](tmp_path / "other", "wz")
    with pytest.raises(ValueError, match="mode"):
        openers[2](tmp_path / "other", "wz")


def test_script_goes_on_when_the_store_has_ended(openers, tmp_path, monkeypatch):
    file = openers[1](tmp_path / "file", "w")
    file.write("text")

    def fail(*arguments):
        raise DistNetworkError("connection reset by peer")

    for name in ("add", "set", "wait", "get"):
        monkeypatch.setattr(HashStore, name, fail)
    file.close()
    with openers[2](tmp_path / "other", "w") as other:
        other.write("text")
    assert (tmp_path / "file").read_text() == (tmp_path / "other").read_text() == "text"


def test_other_files_are_opened_as_always(openers, tmp_path):
    for rank in (1, 0):
        assert openers[rank](os.devnull, "w").name == os.devnull
        descriptor = os.open(tmp_path / f"{rank}", os.O_CREAT | os.O_WRONLY)
        with openers[rank](descriptor, "w") as file:
            file.write("text")
        assert (tmp_path / f"{rank}").read_text() == "text"
