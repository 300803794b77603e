"""Files that a script makes on every worker are those of one process."""

import functools
import os
import shutil
import tempfile
import threading
import time
import zipfile
from dataclasses import replace
from datetime import timedelta
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore

from moreh.errors import WorkerError
from moreh.runtime.launch.removals import Removals, make_removal
from moreh.runtime.launch.script_files import _make_mkdir, _make_open, _make_save, _make_save_pretrained
from moreh.runtime.launch.shared_calls import SharedCalls
from moreh.runtime.sharding.lazy_parameters import as_lazy, file_data
from tests.helpers.models.tiny_models import build, tiny_config_of


@pytest.fixture
def workers():
    """What two workers have in common, of which each has its own counts."""
    store = HashStore()
    return [SharedCalls(store), SharedCalls(store)]


def outcome(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return type(error).__name__
    return "done"


def test_directory_is_made_once_and_made_twice_is_an_error_on_each_worker(workers, tmp_path):
    mkdirs = [_make_mkdir(worker, set(), os.mkdir) for worker in workers]
    (tmp_path / "older").mkdir()
    # The second worker is first for one directory and last for the others.
    assert [outcome(mkdir, tmp_path / "new") for mkdir in mkdirs] == ["done", "done"]
    assert [outcome(mkdir, str(tmp_path / "other")) for mkdir in reversed(mkdirs)] == ["done", "done"]
    for name, error in (("new", "FileExistsError"), ("older", "FileExistsError"), ("no/parent", "FileNotFoundError")):
        assert [outcome(mkdir, tmp_path / name) for mkdir in mkdirs] == [error, error]


def test_parents_that_another_worker_has_made_do_not_change_the_outcome(workers, tmp_path):
    """`Path.mkdir(parents=True)` tries without parents first."""
    first, second = (_make_mkdir(worker, set(), os.mkdir) for worker in workers)
    for mkdir in (first, second):
        assert outcome(mkdir, tmp_path / "new" / "inside") == "FileNotFoundError"
        assert [outcome(mkdir, tmp_path / "new"), outcome(mkdir, tmp_path / "new" / "inside")] == ["done", "done"]


def test_directory_that_one_worker_makes_alone_is_made(workers, tmp_path):
    _make_mkdir(workers[1], set(), os.mkdir)(tmp_path / "own")
    assert (tmp_path / "own").is_dir()


def test_directory_that_was_removed_since_is_made_again(workers, tmp_path):
    first, second = (_make_mkdir(worker, set(), os.mkdir) for worker in workers)
    first(tmp_path / "new")
    (tmp_path / "new").rmdir()
    second(tmp_path / "new")
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize("mode", ["a", "ab"])
def test_only_the_first_worker_appends(tmp_path, workers, mode):
    path = tmp_path / "log.txt"
    for rank in (1, 0, 1):
        with _make_open(rank, workers[0], open, one_machine=True)(path, mode) as file:
            file.write("line\n" if mode == "a" else b"line\n")
        assert path.exists()
    assert path.read_text() == "line\n"


def test_errors_of_appending_and_other_modes_are_as_always(tmp_path, workers):
    opened = _make_open(1, workers[1], open, one_machine=True)
    assert outcome(opened, tmp_path / "none" / "log.txt", "a") == "FileNotFoundError"
    with opened(tmp_path / "text.txt", mode="w", encoding="utf-8") as file:
        file.write("text")
    with opened(tmp_path / "text.txt", encoding="utf-8") as file:
        assert file.read() == "text"
    assert opened(os.devnull, "a").name == os.devnull


@pytest.mark.parametrize("rank", [0, 1])
def test_saved_file_is_complete_at_any_time_and_has_the_names_of_torch(tmp_path, rank):
    path, seen = tmp_path / "state.pt", []

    def slow_save(value, file):
        seen.append(torch.load(path)["step"])
        torch.save(value, file)

    torch.save({"step": 1}, path)
    save = _make_save(rank, slow_save)
    save({"step": 2}, str(path))
    assert seen == [1]
    assert torch.load(path) == {"step": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
    assert {name.partition("/")[0] for name in zipfile.ZipFile(path).namelist()} == {"state"}


def test_failed_save_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        _make_save(1, torch.save)({"step": lambda: 2}, path)
    assert torch.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
    with pytest.raises(RuntimeError, match="does not exist"):
        _make_save(1, torch.save)({}, tmp_path / "none" / "state.pt")


def test_whole_model_is_saved_by_the_worker_that_comes_first(workers, tmp_path):
    """In the dtype that it was loaded for, though its tensors are those of the files."""
    model = build(tiny_config_of("llama", {}))
    for parameter in model.parameters():
        as_lazy(parameter, torch.bfloat16)
    methods = [_make_save_pretrained(worker, type(model).save_pretrained) for worker in workers]
    for name in ("out", "temporary-0"):
        with (
            mock.patch("transformers.distributed.mixin._is_torch_distributed_initialized", return_value=True),
            mock.patch("transformers.distributed.mixin._get_torch_distributed_rank", return_value=1),
        ):
            methods[0](model, tmp_path / name)
    (tmp_path / "out" / "config.json").unlink()
    for name in ("out", "temporary-1"):
        methods[1](model, tmp_path / name)
    assert not (tmp_path / "out" / "config.json").exists()
    for name in ("out", "temporary-0", "temporary-1"):
        saved = load_file(tmp_path / name / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert {file_data(parameter).dtype for parameter in model.parameters()} == {torch.float32}


def test_error_of_the_worker_that_saves_is_an_error_of_all(workers, tmp_path):
    model = build(tiny_config_of("llama", {}))

    def fail(self, directory):
        raise ValueError("no space")

    methods = [_make_save_pretrained(worker, fail) for worker in workers]
    with pytest.raises(ValueError, match="no space"):
        methods[0](model, tmp_path / "out")
    with pytest.raises(WorkerError, match="another worker failed while saving the model"):
        methods[1](model, tmp_path / "out")


def test_new_file_is_made_once_and_made_twice_is_an_error_on_each_worker(workers, tmp_path):
    opened = [_make_open(rank, calls, open, one_machine=True) for rank, calls in enumerate(workers)]
    for rank in (1, 0):
        with opened[rank](tmp_path / "new", "x", encoding="utf-8") as file:
            file.write(f"of {rank}")
    assert (tmp_path / "new").read_text() == "of 1"
    assert [outcome(each, str(tmp_path / "new"), "xb") for each in opened] == ["FileExistsError"] * 2


def removals(workers, function, **changes):
    """A function as each of two workers has it, called from here as a script calls it."""
    made = [Removals(calls, set(), 2, one_machine=True) for calls in workers]
    return [make_removal(replace(each, **changes), function) for each in made]


@pytest.mark.parametrize("function", [os.remove, os.unlink, shutil.rmtree, os.replace, os.rename])
def test_all_workers_remove_what_is_there_once(workers, tmp_path, function):
    path, target = tmp_path / "old", tmp_path / "new"
    made = []

    def counted(*paths):
        made.append(paths)
        function(*paths)

    arguments = (path, target) if function in (os.replace, os.rename) else (path,)
    calls = removals(workers, functools.wraps(function)(counted))
    for _ in range(2):
        (path.mkdir if function is shutil.rmtree else path.touch)()
        first = threading.Thread(target=lambda: calls[0](*arguments))
        first.start()
        calls[1](*arguments)
        first.join()
        assert not path.exists()
    assert len(made) == 2


def test_first_worker_waits_until_the_other_has_written(workers, tmp_path):
    """A directory is renamed while another worker still writes to it."""
    part, whole = tmp_path / "step.part", tmp_path / "step"
    part.mkdir()
    first, second = removals(workers, os.replace)
    thread = threading.Thread(target=lambda: first(part, whole))
    thread.start()
    time.sleep(0.05)
    (part / "state.pt").touch()
    second(part, whole)
    thread.join()
    assert [path.name for path in whole.iterdir()] == ["state.pt"]


def test_worker_that_comes_alone_goes_ahead(workers, tmp_path, monkeypatch):
    monkeypatch.setattr("moreh.runtime.launch.removals.PATIENCE", timedelta(milliseconds=20))
    first, second = removals(workers, os.remove)
    (tmp_path / "file").touch()
    first(tmp_path / "file")
    assert not (tmp_path / "file").exists()
    second(tmp_path / "file")  # its part of the same call
    assert [outcome(call, tmp_path / "none") for call in (first, second)] == ["FileNotFoundError"] * 2


def test_own_temporary_files_are_removed_without_the_others(workers, tmp_path):
    remove, _ = removals(workers, shutil.rmtree, private={str(tmp_path)})
    (tmp_path / "own").mkdir()
    remove(tmp_path / "own")
    assert not (tmp_path / "own").exists()
    private = set()
    with mock.patch("os.mkdir", _make_mkdir(workers[0], private, os.mkdir)), tempfile.TemporaryDirectory() as directory:
        assert private == {directory}
