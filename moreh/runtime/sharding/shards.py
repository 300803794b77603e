"""Which pieces of whole tensors the ranks hold, and where in their local tensors: what loading, saving and resuming share.

`mesh` is None in a process that trains alone, without a process group: it holds everything.
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
    """A box of a whole tensor that a rank holds: the elements of its local tensor from `start` on along `dim`."""

    rank: int
    box: Box
    dim: int
    start: int
    # The rows of the local tensor that the box has, where `dim` is not the first dimension and they are cut.
    first_row: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the box."""
        return tuple(stop - start for start, stop in self.box)

    def of_local(self, local: torch.Tensor) -> torch.Tensor:
        """The view of the rank's local tensor that holds the piece."""
        if not self.box:
            return local
        view = local.narrow(self.dim, self.start, self.shape[self.dim])
        return view if self.dim == 0 else view.narrow(0, self.first_row, self.shape[0])

    def rows(self, first: int, last: int) -> "LocalShard":
        """The part of the piece from row `first` to before row `last` of the whole tensor."""
        skipped = first - self.box[0][0]
        box = ((first, last), *self.box[1:])
        if self.dim == 0:
            return LocalShard(self.rank, box, 0, self.start + skipped)
        return LocalShard(self.rank, box, self.dim, self.start, self.first_row + skipped)

    def of_whole(self, whole: torch.Tensor) -> torch.Tensor:
        """The view of the whole tensor that the piece covers."""
        return whole[tuple(slice(start, stop) for start, stop in self.box)]


def _pieces(layout: ParamSpec, rank: int, tensor: tuple[int, int], data: tuple[int, int]) -> list[LocalShard]:
    dim = 0 if layout.division is None else layout.division.dim
    result, start = [], 0
    for box in shard_boxes(layout, *tensor, *data):
        result.append(LocalShard(rank, box, dim, start))
        start += result[-1].shape[dim] if box else 0
    return result


def global_rank_of(mesh: Mesh | None) -> int:
    """This rank's number in the world."""
    return 0 if mesh is None else mesh.global_rank(mesh.rank("pipeline"), mesh.rank("data"), mesh.rank("tensor"))


def is_owner(layout: ParamSpec, mesh: Mesh | None) -> bool:
    """Whether this rank is in a pipeline rank that holds the parameter, be its own part of it empty."""
    return mesh is None or mesh.rank("pipeline") in layout.pipeline_ranks


def local_shards(layout: ParamSpec, mesh: Mesh | None) -> list[LocalShard]:
    """The pieces in this rank's local tensor, in the order of its elements along the divided dimension."""
    if mesh is None:
        return _pieces(layout, 0, (0, 1), (0, 1))
    if not is_owner(layout, mesh):
        return []
    tensor, data = ((mesh.rank(name), mesh.size(name)) for name in ("tensor", "data"))
    return _pieces(layout, global_rank_of(mesh), tensor, data)


def all_shards(layout: ParamSpec, mesh: Mesh | None) -> list[LocalShard]:
    """Every element of the tensor once, in the order of global ranks: of equal pieces, the lowest rank's."""
    if mesh is None:
        return local_shards(layout, None)
    first: dict[Box, LocalShard] = {}
    tensor_size, data_size = mesh.size("tensor"), mesh.size("data")
    for pipeline, data, tensor in product(sorted(layout.pipeline_ranks), range(data_size), range(tensor_size)):
        rank = mesh.global_rank(pipeline, data, tensor)
        for one in _pieces(layout, rank, (tensor, tensor_size), (data, data_size)):
            first.setdefault(one.box, one)
    return list(first.values())


def local_shape(layout: ParamSpec, mesh: Mesh | None) -> tuple[int, ...]:
    """The shape of a rank's local tensor, also where it is empty."""
    shape = list(layout.shape)
    if mesh is not None and layout.division is not None:
        ranges = [shard_range(block, mesh.size("tensor"), mesh.rank("tensor")) for block in layout.division.blocks]
        shape[layout.division.dim] = sum(stop - start for start, stop in ranges)
    if mesh is not None and layout.data_dim is not None:
        start, stop = shard_range(shape[layout.data_dim], mesh.size("data"), mesh.rank("data"))
        shape[layout.data_dim] = stop - start
    return tuple(shape)


def tensor_bytes(layout: ParamSpec) -> int:
    """Bytes of the whole tensor."""
    return math.prod(layout.shape) * layout.dtype.itemsize


def check_local_tensors(layouts: Mapping[str, ParamSpec], local: Mapping[str, torch.Tensor], mesh: Mesh | None) -> None:
    """Raise ValueError if a local tensor is missing, superfluous, or of another shape or dtype than its layout says."""
    held = {name for name, layout in layouts.items() if is_owner(layout, mesh)}
    problems = [f"{name} is missing" for name in sorted(held - local.keys())]
    problems += [f"{name} is not held by this rank" for name in sorted(local.keys() - held)]
    for name in sorted(held & local.keys()):
        expected = local_shape(layouts[name], mesh), layouts[name].dtype
        given = tuple(local[name].shape), local[name].dtype
        if given != expected:
            problems.append(f"{name} is {given[0]} {given[1]}, its layout says {expected[0]} {expected[1]}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"The local tensors of rank {global_rank_of(mesh)} do not fit their layouts: {'; '.join(problems[:5])}{more}. "
            "Pass one plain tensor (DTensor.to_local()) for each parameter that the rank holds."
        )
