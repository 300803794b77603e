"""The workers of a run: the rank of this process, and the largest number of all ranks.

Each function imports torch by itself, so that importing this file does not take the seconds that torch takes.
"""


def rank() -> int:
    """The rank of this process among the workers of the run; 0 if it is the only one."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of workers of the run."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def max_over_ranks(number: int) -> int:
    """The largest number of all ranks; collective, so all ranks have to call it."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return number
    device = "cuda" if torch.cuda.is_available() and dist.get_backend() == "nccl" else "cpu"
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
