"""A training is saved under one plan and resumed under another with the same bits."""

import copy
import dataclasses
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor, Shard

import moreh.runtime.checkpoint.training_state as training_state
from moreh.errors import WorkerError
from moreh.runtime.checkpoint.optimizer_state import CheckpointError
from moreh.runtime.checkpoint.training_state import (
    layouts_of_whole,
    load_extra,
    load_state,
    save_state,
    save_state_async,
    state_to_save,
)
from moreh.runtime.sharding.local_weights import materialize_local_shards
from moreh.runtime.sharding.mesh import make_mesh
from tests.helpers.workers import run_on_workers
from tests.runtime.checkpoint.test_hf_save import build, param_specs_of

FAMILY = "gpt2"
# The workers of each size in a grid: pipeline, data and tensor ranks, and whether data-parallel ranks shard.
SMALL = [(2, 1, 1, False), (1, 2, 1, True), (1, 1, 2, False)]
LARGE = [(1, 1, 4, False), (2, 2, 1, True), (2, 1, 2, False), (1, 2, 2, True)]


def trained(optimizer_class=torch.optim.AdamW, seed=0, steps=2, **settings):
    """A model of one worker with an optimizer of two groups. One parameter is frozen, one has no gradient."""
    model = build(FAMILY)
    parameters = dict(model.named_parameters())
    frozen, idle = "transformer.h.0.ln_1.weight", "transformer.h.1.ln_2.bias"
    parameters[frozen].requires_grad_(False)
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "lr": 0.01},
        {"params": [p for name, p in parameters.items() if p.dim() == 1 and name != frozen], "lr": 0.02},
    ]
    optimizer = optimizer_class(groups, **settings)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for name, parameter in parameters.items():
            if parameter.requires_grad and name != idle:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
    return model, optimizer


def named_state(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: dict(values) for parameter, values in optimizer.state.items()}


def divided(model, optimizer, grid, distributed=False):
    """What a rank has of a training: layouts, parts, parameters, and an optimizer of them with its part of the state."""
    mesh = make_mesh(*grid[:3])
    layouts = param_specs_of(model, grid[0], grid[2], grid[3])
    parts = materialize_local_shards(model, layouts, mesh)

    def user_params(name, local):
        if not distributed or layouts[name].data_dim is None:
            return local
        whole = model.get_parameter(name)
        return DTensor.from_local(
            local, mesh.devices["data"], [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    parameters = {name: nn.Parameter(user_params(name, part)) for name, part in parts.items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        group | {"params": [parameters[names[id(p)]] for p in group["params"] if names[id(p)] in parameters]}
        for group in optimizer.param_groups
    ]
    new = type(optimizer)(
        [group | {"params": group["params"] or [nn.Parameter(torch.empty(0))]} for group in groups], lr=1.0
    )
    for name, values in named_state(model, optimizer).items():
        if name in parameters:
            layout, whole, cut = layouts[name], nn.Module(), {}
            for key, value in values.items():
                if value.dim():
                    whole.state = nn.Parameter(value)
                    like = dataclasses.replace(layout, dtype=value.dtype)
                    cut[key] = user_params(name, materialize_local_shards(whole, {"state": like}, mesh)["state"])
                else:
                    cut[key] = value.clone()
            new.state[parameters[name]] = cut
    return layouts, parts, parameters, new, mesh


def local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def same_state(first, second):
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.keys() == second[name].keys()
        for key, value in values.items():
            other = second[name][key]
            assert type(other) is type(value)
            assert torch.equal(local(other), local(value)) if isinstance(value, torch.Tensor) else other == value
            assert not isinstance(value, torch.Tensor) or other.dtype == value.dtype


EXTRA = {
    "step": 7,
    "scheduler": {"last_epoch": 3, "betas": (0.9, 0.95)},
    "random": torch.arange(5, dtype=torch.uint8),
    "note": "ä",
}


def save_from(directory, grid, distributed, asynchronous):
    layouts, parts, parameters, optimizer, mesh = divided(*trained(), grid, distributed)
    extra = EXTRA if dist.get_rank() == 0 else {"of": "another rank"}
    state = state_to_save(layouts, parts, [optimizer], parameters, mesh, extra)
    if asynchronous:
        future = save_state_async(state, directory, mesh)
        for tensor in parts.values():  # the training goes on
            tensor.zero_()
        future.result()
    else:
        save_state(state, directory, mesh)
    return sum(path.stat().st_size for path in directory.glob(f"__{dist.get_rank()}_*"))


def resume_in(directory, grid, distributed):
    expected = divided(*trained(), grid, distributed)
    other_model, other_optimizer = trained(seed=9, steps=distributed)  # the optimizer is new, or has made a step
    with torch.no_grad():
        for parameter in other_model.parameters():
            parameter.add_(1)
    layouts, parts, parameters, optimizer, mesh = divided(other_model, other_optimizer, grid, distributed)
    extra = load_state(directory, layouts, parts, [optimizer], parameters, mesh)
    assert str(extra) == str(load_extra(directory)) == str(EXTRA)
    for name, part in expected[1].items():
        assert torch.equal(parts[name], part)
        assert torch.equal(local(parameters[name].detach()), part)  # they share memory
    names = {id(parameter): name for name, parameter in parameters.items()}
    expected_names = {id(parameter): name for name, parameter in expected[2].items()}
    same_state(
        {expected_names[id(parameter)]: values for parameter, values in expected[3].state.items()},
        {names[id(parameter)]: values for parameter, values in optimizer.state.items()},
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [group["lr"] for group in trained()[1].param_groups] != [0.01, 0.02]
    return len(optimizer.state)


def resume_alone(directory):
    model, optimizer = trained(seed=9, steps=0)
    parts = {name: parameter.detach() for name, parameter in model.named_parameters()}
    extra = load_state(directory, layouts_of_whole(model), parts, [optimizer], dict(model.named_parameters()), None)
    expected_model, expected_optimizer = trained()
    assert all(torch.equal(tensor, expected_model.state_dict()[name]) for name, tensor in model.state_dict().items())
    same_state(named_state(expected_model, expected_optimizer), named_state(model, optimizer))
    assert [{**group, "params": 0} for group in optimizer.param_groups] == [
        {**group, "params": 0} for group in expected_optimizer.param_groups
    ]
    # Both go on alike.
    for trained_model, trained_optimizer in ((model, optimizer), (expected_model, expected_optimizer)):
        for parameter in trained_model.parameters():
            parameter.grad = torch.ones_like(parameter)
        trained_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected_model.parameters(), strict=True))
    return extra


def save_alone(directory, optimizer_class=torch.optim.AdamW, extra=EXTRA, **settings):
    model, optimizer = trained(optimizer_class, **settings)
    parts = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = state_to_save(layouts_of_whole(model), parts, [optimizer], dict(model.named_parameters()), None, extra)
    save_state(state, directory, None)


def test_one_worker_saves_and_resumes(tmp_path):
    save_alone(tmp_path / "state")
    assert str(resume_alone(tmp_path / "state")) == str(load_extra(tmp_path / "state")) == str(EXTRA)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def stored_names(directory):
    kinds = FileSystemReader(directory).read_metadata().state_dict_metadata
    return {name: kind.size for name, kind in kinds.items() if name not in ("extra", "groups")}


def test_any_plan_is_resumed_under_any_other(tmp_path):
    save_alone(tmp_path / "alone")
    saved = [tmp_path / "alone"]
    for size, grids in ((4, LARGE), (2, SMALL)):
        cases = [(tmp_path / f"{size} {n}", grid, n % 2 == 1, n < 2) for n, grid in enumerate(grids)]
        written = run_on_workers(save_from, cases, size=size)
        assert all(min(sizes) > 0 for sizes in written)  # the ranks share the work
        saved += [case[0] for case in cases]
    names = stored_names(saved[0])
    for directory in saved:
        assert stored_names(directory) == names
        resume_alone(directory)
    whole = len(trained()[1].state)
    # Each on four workers, every other one on two.
    for size, grids, step in ((4, LARGE, 1), (2, SMALL, 2)):
        cases = [(directory, grids[n % len(grids)], n % 2 == 1) for n, directory in enumerate(saved[::step])]
        held = run_on_workers(resume_in, cases, size=size)
        assert any(max(counts) < whole for counts in held)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in saved)


def test_blocks_are_stored_in_the_order_of_the_whole_matrix(tmp_path):
    """The query, key and value columns of GPT-2, which tensor parallelism cuts each by itself."""
    run_on_workers(save_from, [(tmp_path / "state", (1, 1, 4, False), False, False)], size=4)
    chunks = (
        FileSystemReader(tmp_path / "state")
        .read_metadata()
        .state_dict_metadata["model/transformer.h.0.attn.c_attn.weight"]
    )
    assert sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks.chunks) == [
        ((0, column), (16, 4)) for column in range(0, 48, 4)
    ]


def fail_in_rank(directory, rank, place):
    """One rank cannot write; returns each rank's error."""
    layouts, parts, parameters, optimizer, mesh = divided(*trained(), (2, 1, 2, False))
    state = state_to_save(layouts, parts, [optimizer], parameters, mesh)
    owner, name = {"write": (FileSystemWriter, "write_data"), "publish": (training_state, "publish_directory")}[place]
    original = getattr(owner, name)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    try:
        if dist.get_rank() == rank:
            setattr(owner, name, fail)
        for saving in (save_state, lambda *arguments: save_state_async(*arguments).result()):
            with pytest.raises(OSError if dist.get_rank() == rank else WorkerError, match="No space left"):
                saving(state, directory, mesh)
    finally:
        setattr(owner, name, original)


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_ends_all_ranks_and_leaves_an_older_checkpoint(tmp_path, exists):
    if exists:
        save_alone(tmp_path / "state")
    run_on_workers(fail_in_rank, [(tmp_path / "state", 2, "write"), (tmp_path / "state", 0, "publish")], size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["state"] * exists
    if exists:
        resume_alone(tmp_path / "state")


def kill_while_saving(directory):
    layouts, parts, parameters, optimizer, mesh = divided(*trained(), (1, 1, 2, False))
    state = state_to_save(layouts, parts, [optimizer], parameters, mesh)
    reached, held = threading.Event(), threading.Event()

    def wait(*arguments):
        reached.set()
        held.wait(10)

    original, training_state.publish_directory = training_state.publish_directory, wait
    future = save_state_async(state, directory, mesh)
    if dist.get_rank() == 0:
        reached.wait(30)
    there = directory.exists()
    held.set()
    future.result()
    training_state.publish_directory = original
    return there, directory


def test_nothing_has_the_name_before_all_is_written(tmp_path):
    for there, _ in run_on_workers(kill_while_saving, [(tmp_path / "state",)], size=2)[0]:
        assert not there


def save_shifted(directory):
    """Rank 1's rows begin one too early."""
    layouts, parts, parameters, optimizer, mesh = divided(*trained(), (1, 1, 2, False))
    state = state_to_save(layouts, parts, [optimizer], parameters, mesh)
    stored = state["model/transformer.wte.weight"]
    if dist.get_rank() == 1:
        stored.views = {(offset[0] - 1, offset[1]): view for offset, view in stored.views.items()}
    with pytest.raises((ValueError, WorkerError), match="Failed to validate global plan"):
        save_state(state, directory, mesh)


def test_pieces_that_overlap_are_noticed(tmp_path):
    run_on_workers(save_shifted, [(tmp_path / "state",)], size=2)
    assert list(tmp_path.iterdir()) == []


def refuse_adafactor(directory):
    layouts, parts, parameters, _, mesh = divided(*trained(), (1, 1, 2, False))
    optimizer = torch.optim.Adafactor(list(parameters.values()))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(
        CheckpointError, match=r"Adafactor keeps 'row_var' of transformer.wte.weight as a tensor \[1[56], 1\]"
    ) as error:
        state_to_save(layouts, parts, [optimizer], parameters, mesh)
    new = torch.optim.Adafactor(list(parameters.values()))
    with pytest.raises(CheckpointError, match="Adafactor keeps 'row_var'"):
        load_state(directory, layouts, parts, [new], parameters, mesh)
    return str(error.value)


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adafactor, torch.optim.SGD, torch.optim.Rprop])
def test_other_optimizers_of_one_worker(tmp_path, optimizer_class):
    settings = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    save_alone(tmp_path / "state", optimizer_class, **settings)
    model, optimizer = trained(optimizer_class, seed=4, steps=0, **settings)
    parts = {name: parameter.detach() for name, parameter in model.named_parameters()}
    load_state(tmp_path / "state", layouts_of_whole(model), parts, [optimizer], dict(model.named_parameters()), None)
    expected = trained(optimizer_class, **settings)
    same_state(named_state(*expected), named_state(model, optimizer))
    assert named_state(model, optimizer)


def test_state_of_another_shape_is_refused_where_parameters_are_divided(tmp_path):
    save_alone(tmp_path / "state", torch.optim.Adafactor)
    assert "AdamW" in run_on_workers(refuse_adafactor, [(tmp_path / "state",)], size=2)[0][0]


def load_alone(directory, model, optimizers):
    parts = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return load_state(directory, layouts_of_whole(model), parts, optimizers, dict(model.named_parameters()), None)


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path):
    save_alone(tmp_path / "state")
    model, optimizer = trained(seed=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        load_extra(tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        load_alone(tmp_path / "none", model, [optimizer])
    with pytest.raises(CheckpointError, match=r"another model: .*lm_head|embed_tokens.weight is not in it"):
        load_alone(tmp_path / "state", build("llama"), [])
    with pytest.raises(CheckpointError, match=r"transformer.wte.weight is \[31, 16\], here \[33, 16\]"):
        load_alone(tmp_path / "state", build(FAMILY, vocab_size=33), [])
    with pytest.raises(CheckpointError, match="the state of 1 optimizers, and 2 were given"):
        load_alone(tmp_path / "state", model, [optimizer, optimizer])
    with pytest.raises(CheckpointError, match="AdamW has 1 parameter groups, the checkpoint has 2"):
        load_alone(tmp_path / "state", model, [torch.optim.AdamW(model.parameters())])
    swapped = torch.optim.AdamW([{"params": group["params"]} for group in reversed(optimizer.param_groups)])
    with pytest.raises(CheckpointError, match=r"Parameters of group 0 of AdamW were not in it.*ln_1.bias"):
        load_alone(tmp_path / "state", model, [swapped])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("content", [b"", None])
def test_damaged_files(tmp_path, name, content):
    save_alone(tmp_path / "state")
    (tmp_path / "state" / name).unlink()
    if content is not None:
        (tmp_path / "state" / name).write_bytes(content)
    model, optimizer = trained(seed=3)
    with pytest.raises(CheckpointError, match=r"is damaged .*Give an earlier checkpoint|has no complete checkpoint"):
        load_alone(tmp_path / "state", model, [optimizer])


def test_what_cannot_be_read_back_safely_is_refused(tmp_path):
    with pytest.raises(TypeError, match="extra cannot be stored: it may consist of numbers"):
        save_alone(tmp_path / "state", extra={"lock": copy.Error("no")})
    assert list(tmp_path.iterdir()) == []
