"""Errors that end what all ranks do together on all of them: none is left waiting for one that has failed."""

import torch
import torch.distributed as dist

from moreh.errors import WorkerError


def raise_on_all_ranks(
    error: Exception | None, doing: str, device: torch.device | None = None, group: dist.ProcessGroup | None = None
) -> None:
    """Return if no rank of the group has an error, else raise on all of them; collective.

    A rank's own error is raised as it is, elsewhere the lowest failed rank's as a WorkerError that says what was being done
    (`doing`, as in "saving the model"). `device` is where the group's tensors must be, by default the processor.
    """
    failed = torch.tensor([error is not None], dtype=torch.uint8, device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if not failed.item():
        return
    texts: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, None if error is None else f"{type(error).__name__}: {error}", group=group)
    if error is not None:
        raise error
    rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
    raise WorkerError(f"Rank {rank} failed while {doing}, so all ranks stop. Its error: {text}")
