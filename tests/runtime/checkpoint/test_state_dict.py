"""State dicts of a sharded model: loaded from the full model's, copied, and never written as if they were whole."""

import copy

import pytest
import torch

from moreh.errors import WorkerError
from moreh.runtime.checkpoint.state_dict import ShardedStateDict, load_into_local_tensors, local_state_dict
from moreh.runtime.sharding.local_weights import materialize_local_shards
from tests.helpers.models.checkpoint_models import GRIDS, Grid, build_model, keep_only_local, specs_of
from tests.helpers.workers import run_on_workers


def load_full_and_local_state_dicts(grid):
    """Returns the number of entries that this rank holds."""
    mesh = grid.mesh()
    model, full_model = build_model("gpt2"), build_model("gpt2")
    full_state = {name: tensor * 3 for name, tensor in model.state_dict().items()}
    specs = specs_of(model, grid)
    local_tensors = materialize_local_shards(model, specs, mesh)
    keep_only_local(model, local_tensors)
    assert load_into_local_tensors(model, full_state, specs, local_tensors, mesh) == ([], [])
    full_model.load_state_dict(full_state)
    expected = materialize_local_shards(full_model, specs, mesh)
    assert expected.keys() == local_tensors.keys()
    assert all(torch.equal(local_tensors[name], shard) for name, shard in expected.items())

    local_state = local_state_dict(model, local_tensors, rank=3)
    held = local_tensors.keys() | ({"lm_head.weight"} if "transformer.wte.weight" in local_tensors else set())
    assert list(local_state) == [name for name in full_state if name in held]
    copied = copy.deepcopy(local_state)
    assert local_state.copy().rank == copied.rank == 3
    for tensor in local_tensors.values():
        tensor.zero_()
    assert load_into_local_tensors(model, copied, specs, local_tensors, mesh) == ([], [])
    assert all(torch.equal(local_tensors[name], shard) for name, shard in expected.items())
    return len(local_state)


def test_state_dicts_are_loaded_into_local_tensors():
    full = len(build_model("gpt2").state_dict())
    cases = [(grid,) for grid in GRIDS]
    for grid, held in zip(GRIDS, run_on_workers(load_full_and_local_state_dicts, cases, size=4), strict=True):
        assert max(held) < full or grid.pipeline == 1


def test_a_local_state_dict_is_not_written_as_if_it_were_whole(tmp_path):
    state = ShardedStateDict({"weight": torch.ones(2)}, rank=3)
    with pytest.raises(WorkerError, match=r"part of rank 3 only.*save_pretrained.*save_training"):
        torch.save(state, tmp_path / "state.pt")
    with pytest.raises(WorkerError, match="part of rank 3 only"):
        torch.save({"model": state}, tmp_path / "state.pt")


def test_a_state_dict_that_does_not_fit_changes_nothing():
    model = build_model("llama")
    specs = specs_of(model, Grid(1, 1, 1))
    local_tensors = materialize_local_shards(model, specs, None)
    before = {name: local.clone() for name, local in local_tensors.items()}
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    del state["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"missing keys \['model.norm.weight'\]; unexpected keys \['more'\]"):
        load_into_local_tensors(model, state | {"more": torch.ones(1)}, specs, local_tensors, None)
    wrong_shape = state | {"lm_head.weight": torch.ones(2)}
    with pytest.raises(RuntimeError, match=r"lm_head.weight has the shape \(2,\) instead of \(31, 16\)"):
        load_into_local_tensors(model, wrong_shape, specs, local_tensors, None, strict=False)
    assert all(torch.equal(before[name], local) for name, local in local_tensors.items())
    result = load_into_local_tensors(model, state | {"more": torch.ones(1)}, specs, local_tensors, None, strict=False)
    assert result == (["model.norm.weight"], ["more"])
    assert torch.equal(local_tensors["lm_head.weight"], before["lm_head.weight"] + 1)
