"""A damaged entry of the cache is made anew, with one line; what killed processes have left is removed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from moreh.runtime.checkpoint.manifest import MANIFEST
from tests.helpers.scripts.tiny_runs import prepare
from utils.config.yaml_file import load_config
from utils.data.cache import find_damage, make_once
from utils.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Settings whose data is in the cache, and the directory of its entry."""
    directory = tmp_path_factory.mktemp("prepared")
    rows = [{"prompt": f"def f{i}():\n", "response": f"    return {i}\n"} for i in range(40)]
    (directory / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (directory / "tiny.yaml").write_text(
        f"run: {{name: tiny, directory: {directory}, cache_directory: {directory}/cache}}\n"
        "model: {architecture: {model_type: gpt2, n_layer: 1, n_embd: 32, n_head: 2, n_positions: 64}}\n"
        "tokenizer: {vocabulary_size: 300}\n"
        f"data: {{files: [{directory}/d.jsonl], max_length: 48, eval_rows: 8}}\n"
        "train: {steps: 4, batch_size: 8, lr: 1.0e-3}\n",
        encoding="utf-8",
    )
    config = load_config(str(directory / "tiny.yaml"), [])
    data = prepare(config)
    (entry,) = (directory / "cache").glob("data-*")
    assert find_damage(entry) is None
    return config, entry, data.train.to_list()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


# What is done to an entry, and what the line says of it.
DAMAGES = {
    "bit of the rows": (lambda entry: flip(entry / "rows.arrow"), "rows.arrow: its checksum is"),
    "end of the rows": (lambda entry: cut(entry / "rows.arrow"), "rows.arrow: it has"),
    "no rows": (lambda entry: (entry / "rows.arrow").unlink(), "rows.arrow: it is missing"),
    "empty rows": (lambda entry: (entry / "rows.arrow").write_bytes(b""), "rows.arrow: it has 0 bytes"),
    "more rows": (lambda entry: shutil.copy(entry / "rows.arrow", entry / "rows_2.arrow"), "rows_2.arrow does not"),
    "bit of the choice": (lambda entry: flip(entry / "train.npy"), "train.npy: its checksum is"),
    "no choice": (lambda entry: (entry / "evaluation.npy").unlink(), "evaluation.npy: it is missing"),
    "exchanged choice": (lambda entry: shutil.copy(entry / "train.npy", entry / "evaluation.npy"), "evaluation.npy: "),
    "counts": (lambda entry: (entry / "counts.json").write_text("{}"), "counts.json: it has 2 bytes"),
    "bit of the tokenizer": (lambda entry: flip(entry / "tokenizer" / "tokenizer.json"), "tokenizer/tokenizer.json: "),
    "no tokenizer": (lambda entry: shutil.rmtree(entry / "tokenizer"), "tokenizer"),
    "bit of the manifest": (lambda entry: flip(entry / MANIFEST), "its manifest.json is missing or damaged"),
    "no manifest": (lambda entry: (entry / MANIFEST).unlink(), "its manifest.json is missing or damaged"),
    "file": (lambda entry: (shutil.rmtree(entry), entry.write_text("no directory")), "it is a file"),
    "empty": (lambda entry: (shutil.rmtree(entry), entry.mkdir()), "its manifest.json is missing or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_made_anew(prepared, damage):
    config, entry, rows = prepared
    do, reason = DAMAGES[damage]
    do(entry)
    lines = []
    assert prepare(config, lines.append).train.to_list() == rows
    said = [line for line in lines if "is rebuilt" in line]
    assert len(said) == 1
    assert said[0].startswith(f"warning: {entry} is damaged ({reason}")
    assert find_damage(entry) is None
    lines.clear()
    prepare(config, lines.append)
    assert not [line for line in lines if "is rebuilt" in line or "Reading and" in line]


def test_entry_under_another_name_is_noticed(prepared):
    _, entry, _ = prepared
    other = entry.with_name("data-0123456789abcdef")
    shutil.copytree(entry, other)
    assert find_damage(other) == f"it is {entry.name} under another name"


def test_manifest_that_names_files_elsewhere_is_damaged(prepared, tmp_path):
    from moreh.runtime.checkpoint.manifest import FileSum, Manifest, write_manifest

    for name in ("../outside", "/etc/passwd", "a/../../b"):
        write_manifest(tmp_path, Manifest({name: FileSum(0, 0)}, {"entry": tmp_path.name}))
        assert find_damage(tmp_path) == "its manifest.json is missing or damaged"


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    leftover = tmp_path / "data-1.0123abcd"
    (leftover / "tokenizer").mkdir(parents=True)
    other = tmp_path / "data-12.0123abcd"
    other.mkdir()
    make_once(tmp_path / "data-1", lambda target: (target / "a").touch(), lambda line: None)
    assert not leftover.exists()
    assert other.exists()


def test_entry_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    entry, flushed = tmp_path / "data-1", set()

    def fsync(descriptor):
        flushed.add((Path(f"/proc/self/fd/{descriptor}").readlink().name, entry.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    make_once(entry, lambda target: (target / "a").touch(), lambda line: None)
    assert {("a", False), (MANIFEST, False), (tmp_path.name, True)} <= flushed


def test_full_disk_is_one_line(tmp_path):
    """A limit on the size of files is as real as a full disk, and is the same to every library."""
    import resource

    def write(target):
        (target / "a").write_bytes(b"x" * 10_000)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            make_once(tmp_path / "cache" / "data", write, lambda line: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == f"run.cache_directory: {tmp_path / 'cache'} cannot be used: File too large"
    assert [path.name for path in Path(tmp_path / "cache").iterdir()] in ([], [".data.lock"])
