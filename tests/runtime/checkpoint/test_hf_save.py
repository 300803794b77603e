"""What a sharded model saves is, byte for byte, what one worker saves."""

import filecmp
import functools

import pytest
import torch
import torch.distributed as dist

import moreh.runtime.sharding.shards as shards
from moreh.errors import OptionError, WorkerError
from moreh.patches.save_pretrained import SAFE_SAVE_FILE, SPLIT_INTO_SHARDS
from moreh.runtime.checkpoint.hf_save import save_sharded_model
from moreh.runtime.checkpoint.safetensors_writer import SafetensorsWriter
from moreh.runtime.sharding.local_weights import materialize_local_shards
from tests.helpers.models.checkpoint_models import GRIDS, Grid, build_model, keep_only_local, specs_of
from tests.helpers.workers import run_on_workers


@functools.cache
def _disable_progress_bars():
    from transformers.utils import logging

    logging.disable_progress_bar()


def save_on_ranks(directory, family, changes, grid, save_kwargs, dtype=torch.float32):
    """Shard a model and save it; returns the number of elements that the rank holds."""
    _disable_progress_bars()
    mesh = grid.mesh()
    model = build_model(family, **changes).to(dtype)
    specs = specs_of(model, grid)
    local_tensors = materialize_local_shards(model, specs, mesh)
    keep_only_local(model, local_tensors)
    save_sharded_model(model, directory, specs, local_tensors, mesh, **save_kwargs)
    assert not SAFE_SAVE_FILE.is_active
    assert not SPLIT_INTO_SHARDS.is_active
    return sum(local.numel() for local in local_tensors.values())


def assert_same_files(first, second):
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    _, different, unreadable = filecmp.cmpfiles(first, second, names, shallow=False)
    assert (different, unreadable) == ([], [])


@pytest.mark.parametrize(
    ("family", "changes", "save_kwargs", "dtype"),
    [
        ("llama", {}, {}, torch.float32),
        ("llama", {"tie_word_embeddings": True}, {"max_shard_size": "3KB", "variant": "half"}, torch.bfloat16),
        ("llama", {"saved_buffer": True}, {"safe_serialization": True}, torch.float32),
        ("gpt2", {}, {"max_shard_size": "9KB"}, torch.float32),
        ("mixtral", {}, {"max_shard_size": "9KB"}, torch.float32),
        ("mixtral", {}, {"save_original_format": False}, torch.float16),
    ],
)
def test_saved_files_are_those_of_one_worker(tmp_path, family, changes, save_kwargs, dtype):
    expected = tmp_path / "whole"
    full_model = build_model(family, **changes).to(dtype)
    full_model.save_pretrained(expected, **save_kwargs)
    cases = [(tmp_path / f"sharded{i}", family, changes, grid, save_kwargs, dtype) for i, grid in enumerate(GRIDS)]
    elements_of_cases = run_on_workers(save_on_ranks, cases, size=4)
    for (directory, _, _, grid, *_), elements in zip(cases, elements_of_cases, strict=True):
        assert_same_files(expected, directory)
        if grid != Grid(1, 4, 1):
            assert max(elements) < sum(p.numel() for p in full_model.parameters())  # it really was sharded
    # Nothing else is left.
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["whole", *(case[0].name for case in cases)])


def save_twice(directory, first, second):
    for changes, save_kwargs in (first, second):
        save_on_ranks(directory, "llama", changes, GRIDS[0], save_kwargs)


@pytest.mark.parametrize(("before", "after"), [("3KB", "50GB"), ("50GB", "3KB"), ("3KB", "9KB"), ("50GB", "50GB")])
def test_an_older_model_is_replaced_and_other_files_stay(tmp_path, before, after):
    directory, expected = tmp_path / "model", tmp_path / "expected"
    directory.mkdir()
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.fp16.safetensors").write_text("another variant")
    build_model("llama", hidden_size=32).save_pretrained(expected, max_shard_size=after)
    first, second = ({}, {"max_shard_size": before}), ({"hidden_size": 32}, {"max_shard_size": after})
    run_on_workers(save_twice, [(directory, first, second)], size=4)
    for name in ("tokenizer.json", "model.fp16.safetensors"):
        (directory / name).unlink()  # raises if it is gone
    assert_same_files(expected, directory)


def save_on_a_full_disk(directory, after_tensors):
    """Rank 0 fails after some tensors; returns each rank's error."""
    written = []
    original = SafetensorsWriter.write

    def write(self, name, tensor):
        if len(written) == after_tensors:
            raise OSError(28, "No space left on device")
        written.append(name)
        original(self, name, tensor)

    SafetensorsWriter.write = write
    try:
        save_on_ranks(directory, "llama", {}, Grid(2, 1, 2), {"max_shard_size": "3KB"})
    except (OSError, WorkerError) as error:
        return type(error).__name__, str(error)
    finally:
        SafetensorsWriter.write = original


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_on_rank_0_raises_on_all_ranks_and_changes_nothing(tmp_path, exists):
    directory = tmp_path / "model"
    if exists:
        build_model("llama").save_pretrained(directory)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for errors in run_on_workers(save_on_a_full_disk, [(directory, 0), (directory, 9)], size=4):
        assert errors[0] == ("OSError", "[Errno 28] No space left on device")
        assert {kind for kind, _ in errors[1:]} == {"WorkerError"}
        assert all("Rank 0 failed while saving the model" in text and "No space left" in text for _, text in errors[1:])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def save_with_a_wrong_shard(directory):
    grid = Grid(2, 1, 2)
    mesh = grid.mesh()
    model = build_model("llama")
    specs = specs_of(model, grid)
    local_tensors = materialize_local_shards(model, specs, mesh)
    if dist.get_rank() == 3:
        local_tensors["lm_head.weight"] = local_tensors["lm_head.weight"][1:]
    try:
        save_sharded_model(model, directory, specs, local_tensors, mesh)
    except (ValueError, WorkerError) as error:
        return str(error)


def test_a_shard_of_the_wrong_size_is_refused_before_anything_is_written(tmp_path):
    (errors,) = run_on_workers(save_with_a_wrong_shard, [(tmp_path / "model",)], size=4)
    assert all("lm_head.weight is (14, 16) torch.float32, its spec says (15, 16)" in error for error in errors)
    assert list(tmp_path.iterdir()) == []


def save_from_wrong_boxes(directory):
    """Rank 1 takes its rows one too early: what it holds has the right size."""
    original, grid = shards.shard_boxes, GRIDS[0]
    mesh = grid.mesh()

    def shifted(*arguments):
        return [
            ((box[0][0] - 1, box[0][1] - 1), *box[1:]) if len(box) == 2 and box[0][0] else box
            for box in original(*arguments)
        ]

    model = build_model("llama")
    specs = specs_of(model, grid)
    if dist.get_rank() == 1:
        shards.shard_boxes = shifted
    local_tensors = materialize_local_shards(model, specs, mesh)
    shards.shard_boxes = original
    save_sharded_model(model, directory, specs, local_tensors, mesh)


def test_comparison_of_files_finds_a_box_that_is_off_by_one(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "whole")
    run_on_workers(save_from_wrong_boxes, [(tmp_path / "sharded",)], size=4)
    with pytest.raises(AssertionError, match=r"model\.safetensors"):
        assert_same_files(tmp_path / "whole", tmp_path / "sharded")


def test_comparison_of_files_finds_a_nan(tmp_path):
    model = build_model("llama")
    model.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "sharded")
    with pytest.raises(AssertionError, match=r"model\.safetensors"):
        assert_same_files(tmp_path / "whole", tmp_path / "sharded")


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ({"push_to_hub": True}, "hf upload"),
        ({"state_dict": {"a": 1}}, "leave it out"),
        ({"safe_serialization": False}, "safetensors only"),
        ({"distributed_checkpoint": True}, "torch.distributed.checkpoint"),
    ],
)
def test_arguments_that_a_sharded_model_has_no_use_for_are_refused(tmp_path, argument, remedy):
    with pytest.raises(OptionError, match=remedy):
        save_sharded_model(build_model("llama"), tmp_path / "model", {}, {}, None, **argument)
