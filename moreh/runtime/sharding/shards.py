"""The shards of each rank, and their position in the local tensors.

Loading, saving and resuming are built on this module. `mesh` is None in a process that trains alone, without a process
group. Such a process holds all of every tensor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch

from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.spec import Box, ParamSpec, shard_boxes, shard_range


@dataclass(frozen=True)
class LocalShard:
    """A box of a full tensor, and its place in the local tensor of the rank that holds it."""

    rank: int
    """The global rank."""
    box: Box
    """The box, in coordinates of the full tensor. Empty for a scalar."""
    dim: int
    """The dimension along which the rank's boxes are concatenated."""
    offset: int
    """The start of the box along `dim` of the local tensor."""
    row_offset: int = 0
    """The start of the box along dimension 0 of the local tensor, for a slice of rows if `dim` is not 0."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the box."""
        return tuple(stop - start for start, stop in self.box)

    def view_of_local(self, local: torch.Tensor) -> torch.Tensor:
        """The view of the rank's local tensor that has the box."""
        if not self.box:
            return local
        view = local.narrow(self.dim, self.offset, self.shape[self.dim])
        return view if self.dim == 0 else view.narrow(0, self.row_offset, self.shape[0])

    def view_of_full(self, full: torch.Tensor) -> torch.Tensor:
        """The view of the full tensor that has the box."""
        return full[tuple(slice(start, stop) for start, stop in self.box)]

    def slice_rows(self, first: int, last: int) -> "LocalShard":
        """The part of the shard from row `first` to before row `last` of the full tensor."""
        skipped = first - self.box[0][0]
        box = ((first, last), *self.box[1:])
        if self.dim == 0:
            return LocalShard(self.rank, box, 0, self.offset + skipped)
        return LocalShard(self.rank, box, self.dim, self.offset, self.row_offset + skipped)


def _shards_of_rank(spec: ParamSpec, rank: int, tp: tuple[int, int], dp: tuple[int, int]) -> list[LocalShard]:
    """The shards that a global rank holds. `tp` and `dp` are its rank and the number of ranks in either dimension."""
    dim = 0 if spec.tp_split is None else spec.tp_split.dim
    shards: list[LocalShard] = []
    offset = 0
    for box in shard_boxes(spec, *tp, *dp):
        shards.append(LocalShard(rank, box, dim, offset))
        offset += shards[-1].shape[dim] if box else 0
    return shards


def global_rank_of(mesh: Mesh | None) -> int:
    """This process's global rank."""
    return 0 if mesh is None else mesh.global_rank(mesh.rank("pipeline"), mesh.rank("data"), mesh.rank("tensor"))


def is_owner(spec: ParamSpec, mesh: Mesh | None) -> bool:
    """True if this rank's pipeline rank holds the parameter, even if the rank's own shard of it is empty."""
    return mesh is None or mesh.rank("pipeline") in spec.pipeline_ranks


def local_shards(spec: ParamSpec, mesh: Mesh | None) -> list[LocalShard]:
    """The shards in this rank's local tensor, in the order in which they are concatenated."""
    if mesh is None:
        return _shards_of_rank(spec, 0, (0, 1), (0, 1))
    if not is_owner(spec, mesh):
        return []
    tp, dp = ((mesh.rank(dimension), mesh.size(dimension)) for dimension in ("tensor", "data"))
    return _shards_of_rank(spec, global_rank_of(mesh), tp, dp)


def all_shards(spec: ParamSpec, mesh: Mesh | None) -> list[LocalShard]:
    """Shards that have every element once, in the order of global ranks. Of several replicas, the lowest rank's one."""
    if mesh is None:
        return local_shards(spec, None)
    by_box: dict[Box, LocalShard] = {}
    tp_size, dp_size = mesh.size("tensor"), mesh.size("data")
    for pipeline_rank, dp_rank, tp_rank in product(sorted(spec.pipeline_ranks), range(dp_size), range(tp_size)):
        rank = mesh.global_rank(pipeline_rank, dp_rank, tp_rank)
        for shard in _shards_of_rank(spec, rank, (tp_rank, tp_size), (dp_rank, dp_size)):
            by_box.setdefault(shard.box, shard)
    return list(by_box.values())


def local_shape(spec: ParamSpec, mesh: Mesh | None) -> tuple[int, ...]:
    """The shape of this rank's local tensor, even if it is empty."""
    shape = list(spec.shape)
    if mesh is not None and spec.tp_split is not None:
        ranges = [shard_range(size, mesh.size("tensor"), mesh.rank("tensor")) for size in spec.tp_split.chunk_sizes]
        shape[spec.tp_split.dim] = sum(stop - start for start, stop in ranges)
    if mesh is not None and spec.fsdp_dim is not None:
        start, stop = shard_range(shape[spec.fsdp_dim], mesh.size("data"), mesh.rank("data"))
        shape[spec.fsdp_dim] = stop - start
    return tuple(shape)


def full_tensor_bytes(spec: ParamSpec) -> int:
    """Bytes of the full tensor."""
    return math.prod(spec.shape) * spec.dtype.itemsize


def check_local_tensors(
    specs: Mapping[str, ParamSpec], local_tensors: Mapping[str, torch.Tensor], mesh: Mesh | None
) -> None:
    """Check that this rank has the local tensors that the specs describe.

    Raises:
        ValueError: a local tensor is missing or superfluous, or has another shape or dtype.
    """
    owned = {name for name, spec in specs.items() if is_owner(spec, mesh)}
    problems = [f"{name} is missing" for name in sorted(owned - local_tensors.keys())]
    problems += [f"{name} is not held by this rank" for name in sorted(local_tensors.keys() - owned)]
    for name in sorted(owned & local_tensors.keys()):
        expected = local_shape(specs[name], mesh), specs[name].dtype
        actual = tuple(local_tensors[name].shape), local_tensors[name].dtype
        if actual != expected:
            problems.append(f"{name} is {actual[0]} {actual[1]}, its spec says {expected[0]} {expected[1]}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"The local tensors of rank {global_rank_of(mesh)} do not fit their specs: {'; '.join(problems[:5])}{more}."
            " Pass one plain tensor (DTensor.to_local()) for each parameter that the rank holds."
        )
