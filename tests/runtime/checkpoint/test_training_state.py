"""A training is saved under one plan and resumed under another with the same bits."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from moreh.errors import WorkerError
from moreh.runtime.checkpoint import dcp_io
from moreh.runtime.checkpoint.dcp_io import save_state_async
from moreh.runtime.checkpoint.training_state import collect_training_state, load_extra, load_training_state
from moreh.runtime.sharding.global_tensor import local_part
from tests.helpers.models.checkpoint_models import Grid
from tests.helpers.training_states import (
    EXTRA,
    assert_same_state,
    load_alone,
    optimizer_state_by_name,
    resume_alone,
    save_alone,
    shard_training,
    train,
)
from tests.helpers.workers import run_on_workers

TWO_RANKS = [Grid(2, 1, 1), Grid(1, 2, 1, fsdp=True), Grid(1, 1, 2)]
FOUR_RANKS = [Grid(1, 1, 4), Grid(2, 2, 1, fsdp=True), Grid(2, 1, 2), Grid(1, 2, 2, fsdp=True)]


def save_on_ranks(directory, grid, as_global, trains_on):
    """Returns the bytes that the rank wrote. With `trains_on`, the weights change while they are written."""
    specs, local_tensors, parameters, optimizer, mesh = shard_training(*train(), grid, as_global)
    extra = EXTRA if dist.get_rank() == 0 else {"of": "another rank"}
    state = collect_training_state(specs, local_tensors, [optimizer], parameters, mesh, extra)
    future = save_state_async(state, directory, mesh)
    if trains_on:
        for tensor in local_tensors.values():
            tensor.zero_()
    future.result()
    return sum(path.stat().st_size for path in directory.glob(f"__{dist.get_rank()}_*"))


def resume_on_ranks(directory, grid, as_global):
    """Resume, compare everything, and return the number of parameters of which the rank has optimizer state."""
    expected = shard_training(*train(), grid, as_global)
    other_model, other_optimizer = train(seed=9, steps=as_global)  # the optimizer is new, or has made a step
    with torch.no_grad():
        for parameter in other_model.parameters():
            parameter.add_(1)
    specs, local_tensors, parameters, optimizer, mesh = shard_training(other_model, other_optimizer, grid, as_global)
    extra = load_training_state(directory, specs, local_tensors, [optimizer], parameters, mesh)
    assert str(extra) == str(load_extra(directory)) == str(EXTRA)
    _, expected_tensors, expected_parameters, expected_optimizer, _ = expected
    for name, tensor in expected_tensors.items():
        assert torch.equal(local_tensors[name], tensor)
        assert torch.equal(local_part(parameters[name].detach()), tensor)  # they share memory
    names = {id(parameter): name for name, parameter in parameters.items()}
    expected_names = {id(parameter): name for name, parameter in expected_parameters.items()}
    assert_same_state(
        {names[id(parameter)]: values for parameter, values in optimizer.state.items()},
        {expected_names[id(parameter)]: values for parameter, values in expected_optimizer.state.items()},
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [group["lr"] for group in train()[1].param_groups] != [0.01, 0.02]
    return len(optimizer.state)


def test_one_worker_saves_and_resumes(tmp_path):
    save_alone(tmp_path / "state")
    assert str(resume_alone(tmp_path / "state")) == str(load_extra(tmp_path / "state")) == str(EXTRA)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("key", ["exp_avg", "step"])
def test_comparison_of_states_finds_a_nan(key):
    expected = optimizer_state_by_name(*train())
    assert_same_state(optimizer_state_by_name(*train()), expected)
    actual = optimizer_state_by_name(*train())
    actual["transformer.wte.weight"][key].view(-1)[0] = float("nan")
    with pytest.raises(AssertionError):
        assert_same_state(actual, expected)


def stored_sizes(directory):
    entries = FileSystemReader(directory).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if name not in ("extra", "groups")}


def test_any_plan_is_resumed_under_any_other(tmp_path):
    save_alone(tmp_path / "alone")
    saved = [tmp_path / "alone"]
    for size, grids in ((4, FOUR_RANKS), (2, TWO_RANKS)):
        cases = [(tmp_path / f"{size} {i}", grid, i % 2 == 1, i < 2) for i, grid in enumerate(grids)]
        bytes_of_cases = run_on_workers(save_on_ranks, cases, size=size)
        assert all(min(bytes_of_ranks) > 0 for bytes_of_ranks in bytes_of_cases)  # the ranks share the work
        saved += [case[0] for case in cases]
    sizes = stored_sizes(saved[0])
    for directory in saved:
        assert stored_sizes(directory) == sizes
        resume_alone(directory)
    full = len(train()[1].state)
    # Each on four ranks, every other one on two.
    for size, grids, step in ((4, FOUR_RANKS, 1), (2, TWO_RANKS, 2)):
        cases = [(directory, grids[i % len(grids)], i % 2 == 1) for i, directory in enumerate(saved[::step])]
        counts_of_cases = run_on_workers(resume_on_ranks, cases, size=size)
        assert any(max(counts) < full for counts in counts_of_cases)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in saved)


def test_chunks_are_stored_in_the_order_of_the_full_matrix(tmp_path):
    """The query, key and value columns of GPT-2, which tensor parallelism splits each by itself."""
    run_on_workers(save_on_ranks, [(tmp_path / "state", Grid(1, 1, 4), False, False)], size=4)
    metadata = FileSystemReader(tmp_path / "state").read_metadata().state_dict_metadata
    chunks = metadata["model/transformer.h.0.attn.c_attn.weight"].chunks
    assert sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks) == [
        ((0, column), (16, 4)) for column in range(0, 48, 4)
    ]


def fail_on_one_rank(directory, rank, where):
    """One rank cannot write or rename; twice, since a failed save must not stop the next one."""
    specs, local_tensors, parameters, optimizer, mesh = shard_training(*train(), Grid(2, 1, 2))
    state = collect_training_state(specs, local_tensors, [optimizer], parameters, mesh)
    owner, name = {"write": (FileSystemWriter, "write_data"), "rename": (dcp_io, "commit_directory")}[where]
    original = getattr(owner, name)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    try:
        if dist.get_rank() == rank:
            setattr(owner, name, fail)
        for _ in range(2):
            with pytest.raises(OSError if dist.get_rank() == rank else WorkerError, match="No space left"):
                save_state_async(state, directory, mesh).result()
    finally:
        setattr(owner, name, original)


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_raises_on_all_ranks_and_leaves_an_older_checkpoint(tmp_path, exists):
    if exists:
        save_alone(tmp_path / "state")
    run_on_workers(fail_on_one_rank, [(tmp_path / "state", 2, "write"), (tmp_path / "state", 0, "rename")], size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["state"] * exists
    if exists:
        resume_alone(tmp_path / "state")


def look_before_the_rename(directory):
    """Returns whether the directory has its name while rank 0 has written everything and not renamed it."""
    specs, local_tensors, parameters, optimizer, mesh = shard_training(*train(), Grid(1, 1, 2))
    state = collect_training_state(specs, local_tensors, [optimizer], parameters, mesh)
    reached, looked = threading.Event(), threading.Event()

    def wait(*arguments):
        reached.set()
        looked.wait(10)

    original, dcp_io.commit_directory = dcp_io.commit_directory, wait
    future = save_state_async(state, directory, mesh)
    if dist.get_rank() == 0:
        assert reached.wait(30)
    exists = directory.exists()
    looked.set()
    future.result()
    dcp_io.commit_directory = original
    return exists


def test_nothing_has_the_name_before_all_is_written(tmp_path):
    assert run_on_workers(look_before_the_rename, [(tmp_path / "state",)], size=2) == [[False, False]]


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adafactor, torch.optim.SGD, torch.optim.Rprop])
def test_one_worker_resumes_other_optimizers(tmp_path, optimizer_class):
    settings = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    save_alone(tmp_path / "state", optimizer_class, **settings)
    model, optimizer = train(optimizer_class, seed=4, steps=0, **settings)
    load_alone(tmp_path / "state", model, [optimizer])
    state = optimizer_state_by_name(model, optimizer)
    assert_same_state(state, optimizer_state_by_name(*train(optimizer_class, **settings)))
    assert state
