"""Files and directories are complete or absent."""

import os
import re
import stat
from pathlib import Path

import pytest

from moreh.atomic_io import commit_directory, commit_files, make_staging_directory, replacing_file, staging_path


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_when_the_block_ends(tmp_path, durable):
    path = tmp_path / "a.json"
    for content in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with replacing_file(path, durable=durable) as file:
            file.write(content)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_stays_if_the_block_fails(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing_file(path, durable=True) as file:  # noqa: PT012
        file.write("half of")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exists", [False, True])
def test_a_directory_appears_as_a_whole(tmp_path, exists):
    target = tmp_path / "runs" / "state"
    if exists:
        target.mkdir(parents=True)
        (target / "old").touch()
    staging_path(target).mkdir(parents=True)
    (staging_path(target) / "of an interrupted save").touch()
    staging = make_staging_directory(target)
    (staging / "new").touch()
    assert target.exists() == exists
    commit_directory(staging, target)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(target.parent.iterdir()) == [target]


def test_contents_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    target, flushed = tmp_path / "state", set()

    def fsync(descriptor):
        flushed.add((Path(f"/proc/self/fd/{descriptor}").readlink().name, target.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    staging = make_staging_directory(target)
    (staging / "part").mkdir()
    (staging / "part" / "a").touch()
    commit_directory(staging, target)
    assert flushed == {("a", False), ("part", False), (staging.name, False), (tmp_path.name, True)}
    path = tmp_path / "b.json"
    with replacing_file(path, durable=True) as file:
        file.write("text")
    assert [name for name, _ in flushed if name.startswith("b.json.")]


def test_two_processes_that_write_one_directory_do_not_meet(tmp_path):
    target = tmp_path / "cache" / "entry"
    first, second = (make_staging_directory(target, shared=True) for _ in range(2))
    for staging in (first, second):
        (staging / "content").write_text("same")
    commit_directory(first, target, replace=False, durable=False)
    with pytest.raises(OSError, match="not empty"):
        commit_directory(second, target, replace=False, durable=False)
    assert (target / "content").read_text() == "same"


def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(FileExistsError, match="model is a file; give the name of a directory"):
        make_staging_directory(tmp_path / "model")


def test_files_move_into_a_directory_that_keeps_its_others(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    for name in ("index", "part-1", "part-2", "tokenizer"):
        (target / name).write_text("old")
    staging = make_staging_directory(target, inside=True)
    assert staging.parent == target
    for name in ("index", "part-1"):
        (staging / name).write_text("new")
    commit_files(staging, target, entry_points={"index"}, obsolete=re.compile(r"part-\d"))
    staging.rmdir()
    contents = {path.name: path.read_text() for path in target.iterdir()}
    assert contents == {"index": "new", "part-1": "new", "tokenizer": "old"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask_whoever_wrote_a_file(tmp_path, umask, mode):
    """As safetensors, whose files are for the user alone."""
    before = os.umask(umask)
    try:
        with replacing_file(tmp_path / "report", durable=False) as file:
            file.write("text")
        staging = make_staging_directory(tmp_path / "model", shared=True)
        (staging / "tokenizer").mkdir()
        for name in ("weights", "tokenizer/table"):
            (staging / name).touch(0o600)
        commit_directory(staging, tmp_path / "model")
        staging = make_staging_directory(tmp_path / "model", inside=True)
        (staging / "more").touch(0o600)
        commit_files(staging, tmp_path / "model", entry_points=set(), obsolete=re.compile("none"))
    finally:
        os.umask(before)
    files = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) == 4
    assert set(files.values()) == {mode}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask
