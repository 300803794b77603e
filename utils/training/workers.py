"""The worker processes of a run: how many, and which of them speaks."""

import os

import torch

from moreh.accelerator.registry import switch_model
from utils.config.schema import AcceleratorSection
from utils.logging.console import keep_lines

WORKERS_VARIABLE = "MOREH_WORKERS"


def prepare_accelerator(settings: AcceleratorSection) -> None:
    """Switch to the accelerator of the settings and ask for their workers; to be called before the hook, which starts them.

    A variable MOREH_WORKERS that is set already goes before the settings. What moreh says from now on also reaches the
    log of the run, which is opened later.

    Raises:
        AcceleratorError: there is no such accelerator, or a job is running on the current one.
    """
    keep_lines()
    if settings.workers is not None:
        os.environ.setdefault(WORKERS_VARIABLE, str(settings.workers))
    if settings.model is not None:
        # In a worker this finds it switched already, by the process that has started the workers.
        switch_model(str(settings.model))


def any_worker(condition: bool) -> bool:
    """Whether a condition holds on any worker; all must ask at the same places."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return condition
    device = "cuda" if torch.cuda.is_available() and distributed.get_backend() == "nccl" else "cpu"
    holds = torch.tensor(int(condition), device=device)
    distributed.all_reduce(holds, op=distributed.ReduceOp.MAX)
    return bool(holds)


def rank() -> int:
    """The number of this process among the workers of the run; 0 where it is the only one."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
