"""The manifest of a checkpoint: whatever is done to a file is noticed, and nothing that is read runs code."""

import errno
import os
import pickle
import random
import shutil

import pytest
import torch

from moreh.errors import CheckpointError
from moreh.runtime.checkpoint.dcp_io import read_metadata, save_state_async
from moreh.runtime.checkpoint.dcp_tensors import TensorChunks, chunks_of_full
from moreh.runtime.checkpoint.manifest import (
    MANIFEST,
    ChecksumFile,
    Manifest,
    find_damage,
    read_manifest,
    write_manifest,
)
from moreh.runtime.checkpoint.training_state import load_extra
from tests.helpers.training_states import load_alone, save_alone, train

SEED, DAMAGES = 0, 300


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of two steps of a training."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        save_alone(directory / f"step-{step}", extra={"step": step, "order": torch.arange(step)})
    return directory


def damage(path, other, choice):
    """Do one thing to a file; `other` is what another checkpoint has under the same name."""
    kind = choice.choice(["flip", "flip", "flip", "truncate", "swap", "delete", "grow"])
    content = bytearray(path.read_bytes())
    if kind == "flip":
        position = choice.randrange(len(content))
        content[position] ^= 1 << choice.randrange(8)
    elif kind == "truncate":
        del content[choice.randrange(len(content)) :]
    elif kind == "grow":
        content += bytes(choice.randrange(1, 9))
    elif kind == "swap" and other.read_bytes() != content:
        content = other.read_bytes()
    else:
        path.unlink()
        return
    path.write_bytes(content)


def test_whatever_is_done_to_a_file_is_noticed_and_names_it(saved, tmp_path):
    """Flips, truncations, swaps with another step's file, deletions; the manifest's own file included."""
    choice = random.Random(SEED)
    checkpoint, others = tmp_path / "step-2", saved / "step-1"
    shutil.copytree(saved / "step-2", checkpoint)
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == [".metadata", "__0_0.distcp", MANIFEST]
    assert find_damage(checkpoint) is None
    for number in range(DAMAGES):
        name = names[number % len(names)]
        path, whole = checkpoint / name, (checkpoint / name).read_bytes()
        damage(path, others / name, choice)
        found = find_damage(checkpoint)
        assert found is not None, (number, name)
        assert "\n" not in found
        assert str(checkpoint) in found
        if name != MANIFEST:
            assert f"{path} is damaged" in found
        path.write_bytes(whole)
    assert find_damage(checkpoint) is None


def test_files_are_shared_among_those_who_check(saved, tmp_path):
    checkpoint = tmp_path / "step-2"
    shutil.copytree(saved / "step-2", checkpoint)
    (checkpoint / "__0_0.distcp").unlink()
    found = [find_damage(checkpoint, (index, 2)) for index in range(2)]
    assert sorted(each is None for each in found) == [False, True]


def test_manifest_keeps_what_the_script_says(tmp_path):
    about = {"settings": {"lr": 1e-4, "name": "ä"}, "loss": None}
    save_state_async({"x": chunks_of_full(torch.ones(3))}, tmp_path / "state", None, about).result()
    assert read_manifest(tmp_path / "state").about == about


class Evil:
    """An object whose pickle makes a directory when it is read."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


def with_valid_manifest(directory, write):
    """Change a checkpoint as somebody would who wants it to be believed: the checksums fit."""
    about = read_manifest(directory).about
    (directory / MANIFEST).unlink()
    write()
    sums = {}
    for path in directory.iterdir():
        with ChecksumFile(directory.parent / "copy") as copy:
            copy.write(path.read_bytes())
        sums[path.name] = copy.sum
    write_manifest(directory, Manifest(sums, about))


@pytest.mark.parametrize("kind", ["metadata", "class", "elements", "path"])
def test_malicious_files_run_nothing(saved, tmp_path, kind):
    """A pickle instead of the metadata, inside it, and among the tensors; and a file elsewhere."""
    directory, proof = tmp_path / "state", tmp_path / "ran"
    shutil.copytree(saved / "step-2", directory)
    metadata = read_metadata(directory)

    def write():
        if kind == "metadata":
            content = Evil(proof)
        else:
            content = metadata
            if kind == "class":
                content.planner_data = Evil(proof)
            elif kind == "path":
                next(iter(content.storage_data.values())).relative_path = "../secret"
            elif kind == "elements":
                place = next(info for index, info in content.storage_data.items() if index.fqn == "extra")
                torch.save(Evil(proof), directory / place.relative_path)
                place.offset, place.length = 0, (directory / place.relative_path).stat().st_size
        (directory / ".metadata").write_bytes(pickle.dumps(content))

    with_valid_manifest(directory, write)
    assert find_damage(directory) is None
    model, optimizer = train(steps=0)
    for load in (lambda: load_extra(directory), lambda: load_alone(directory, model, [optimizer])):
        with pytest.raises(CheckpointError, match="is damaged"):
            load()
    assert not proof.exists()


def test_malicious_objects_run_nothing(tmp_path):
    """The objects of a checkpoint, such as the state of the scheduler, are bytes of torch.save."""
    proof = tmp_path / "ran"
    evil = tmp_path / "evil"
    torch.save(Evil(proof), evil)
    elements = torch.frombuffer(bytearray(evil.read_bytes()), dtype=torch.uint8)
    state = {"extra": TensorChunks(tuple(elements.shape), torch.uint8, {(0,): elements})}
    save_state_async(state, tmp_path / "state", None).result()
    with pytest.raises(CheckpointError, match="is damaged, or runs code"):
        load_extra(tmp_path / "state")
    assert not proof.exists()


@pytest.mark.parametrize("failures", [1, 10**6], ids=["once", "always"])
def test_full_disk_is_named_in_the_systems_word(tmp_path, monkeypatch, failures):
    """torch's own error is "file write failed", from far below. Later writes may succeed."""
    from moreh.runtime.checkpoint import manifest

    failed = []

    class FullFile(manifest.io.FileIO):
        def write(self, data):
            if len(failed) == failures:
                return super().write(data)
            failed.append(self.name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(manifest.io, "FileIO", FullFile)
    state = {"x": chunks_of_full(torch.ones(2**20))}
    with pytest.raises(OSError, match="No space left on device"):
        save_state_async(state, tmp_path / "state", None).result()
    assert list(tmp_path.iterdir()) == []


def parts_of_extra(metadata):
    """The objects of the metadata that describe `extra`, by class."""
    index, place = next((index, place) for index, place in metadata.storage_data.items() if index.fqn == "extra")
    entry = metadata.state_dict_metadata["extra"]
    parts = (metadata, entry, entry.properties, entry.chunks[0], index, place)
    return {type(part).__name__: part for part in parts}


def damaged_name(metadata, part, name):
    object.__setattr__(part, f"{name}s", part.__dict__.pop(name))


def damaged_value(metadata, part, name):
    object.__setattr__(part, name, "a")


def renamed(metadata, part, name):
    metadata.state_dict_metadata["extrb"] = metadata.state_dict_metadata.pop("extra")


def negative_size(metadata, part, name):
    part.size = torch.Size([-1])


def huge_size(metadata, part, name):
    part.size = torch.Size([2**60])


# What a reader of the state uses.
USED = {
    "Metadata": ["state_dict_metadata", "storage_data"],
    "TensorStorageMetadata": ["properties", "size", "chunks"],
    "TensorProperties": ["dtype"],
    "ChunkStorageMetadata": ["offsets", "sizes"],
    "MetadataIndex": ["fqn", "offset"],
    "_StorageInfo": ["relative_path", "offset", "length"],
}


@pytest.mark.parametrize("damage", [damaged_name, damaged_value, renamed, negative_size, huge_size])
def test_damaged_metadata_is_refused_in_one_line(saved, tmp_path, damage):
    """Each attribute of each object, with checksums that fit."""
    directory = tmp_path / "state"
    attributes = [(kind, name) for kind, names in USED.items() for name in names]
    if damage is damaged_name:
        attributes.remove(("TensorProperties", "dtype"))  # pickled without names
    elif damage is not damaged_value:
        attributes = [("TensorStorageMetadata", "size")]
    for kind, name in attributes:
        shutil.copytree(saved / "step-2", directory)
        metadata = read_metadata(directory)
        damage(metadata, parts_of_extra(metadata)[kind], name)
        with_valid_manifest(directory, lambda m=metadata: (directory / ".metadata").write_bytes(pickle.dumps(m)))
        with pytest.raises(CheckpointError, match="is damaged"):
            load_extra(directory)
        shutil.rmtree(directory)
