"""Random numbers of a divided model: data-parallel ranks and stages draw different ones, tensor-parallel ranks the same."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moreh.runtime.sharding.mesh import Mesh


@contextmanager
def rank_local_rng(mesh: Mesh) -> Iterator[None]:
    """Compute with a generator of this rank's own, seeded by the script's, which moves on by one draw on every rank.

    So workers stay in step however many numbers each of them draws for dropout, and a seed gives one run.
    """
    seed = int(torch.randint(2**62, (1,), device="cpu"))
    place = mesh.rank("pipeline") * mesh.size("data") + mesh.rank("data")
    devices = [mesh.device] if mesh.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed((seed + 0x9E3779B97F4A7C15 * place) % 2**63)
        yield
