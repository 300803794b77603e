"""Errors in collective work: if one rank fails, all ranks raise, and none waits forever."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from moreh.errors import WorkerError


@contextmanager
def failing_together(
    action: str, *, device: torch.device | None = None, group: dist.ProcessGroup | None = None
) -> Iterator[None]:
    """A block that either succeeds on all ranks of a group or raises on all of them at its end; collective.

    Args:
        action: the action in progress, for the message, such as "saving the model".
        device: the device of tensors that the group can reduce; by default the CPU.
        group: the ranks that take part; by default all ranks.

    Raises:
        Exception: on a rank that failed, its own error.
        WorkerError: on the others, with the error of the lowest rank that failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as own_error:
        error = own_error
    failed = torch.tensor([error is not None], dtype=torch.uint8, device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if not failed.item():
        return
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}", group=group)
    if error is not None:
        raise error
    rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
    raise WorkerError(f"Rank {rank} failed while {action}, so all ranks stop. Its error: {message}")
