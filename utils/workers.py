"""The worker processes of a run: which rank this one has, and whether any of them has something to tell the others.

torch is imported where a function needs it, so that importing this file does not take its seconds.
"""


def rank() -> int:
    """The rank of this process among the workers of the run; 0 where it is the only one."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def any_rank(condition: bool) -> bool:
    """Whether a condition holds on any rank. A collective: all ranks have to call it."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return condition
    device = "cuda" if torch.cuda.is_available() and dist.get_backend() == "nccl" else "cpu"
    holds = torch.tensor(int(condition), device=device)
    dist.all_reduce(holds, op=dist.ReduceOp.MAX)
    return bool(holds)
