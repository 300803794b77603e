"""Full tensors are put together from the shards of all ranks."""

import torch

from moreh.runtime.sharding.gather import full_tensor
from moreh.runtime.sharding.local_weights import materialize_local_shards
from moreh.runtime.sharding.spec import ParamSpec
from tests.helpers.models.checkpoint_models import GRIDS, build_model, specs_of
from tests.helpers.workers import run_on_workers


def gather_everything(grid):
    mesh = grid.mesh()
    model = build_model("gpt2")
    specs = specs_of(model, grid)
    local_tensors = materialize_local_shards(model, specs, mesh)
    for name, parameter in model.named_parameters():
        assert torch.equal(full_tensor(specs[name], local_tensors.get(name), mesh), parameter)
    last = grid.pipeline - 1
    local = torch.tensor(7.0) if mesh.rank("pipeline") == last else None
    return len(local_tensors), full_tensor(ParamSpec("scale", (), torch.float32, (last,)), local, mesh).item()


def test_full_tensors_are_there_on_all_ranks():
    cases = [(grid,) for grid in GRIDS]
    for grid, results in zip(GRIDS, run_on_workers(gather_everything, cases, size=4), strict=True):
        assert max(count for count, _ in results) < 28 or grid.pipeline == 1
        assert [value for _, value in results] == [7.0] * 4
