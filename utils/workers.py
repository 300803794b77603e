"""The workers of a run: the rank of this process, and whether a condition holds on any rank.

Each function imports torch by itself, so that importing this file does not take the seconds that torch takes.
"""


def rank() -> int:
    """The rank of this process among the workers of the run; 0 if it is the only one."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def any_rank(condition: bool) -> bool:
    """Whether a condition holds on any rank; collective, so all ranks have to call it."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return condition
    device = "cuda" if torch.cuda.is_available() and dist.get_backend() == "nccl" else "cpu"
    holds = torch.tensor(int(condition), device=device)
    dist.all_reduce(holds, op=dist.ReduceOp.MAX)
    return bool(holds)
