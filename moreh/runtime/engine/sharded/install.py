"""Connects sharded models to the process-wide patches of calls, optimizers and clipping."""

from torch import nn

from moreh.errors import OptionError
from moreh.patches.module_call import before_calls_in_backward, instead_of_model_calls
from moreh.patches.optimizer_creation import on_optimizer_created
from moreh.patches.total_norm import on_total_norm
from moreh.runtime.engine.calls.checks import recomputed_call
from moreh.runtime.engine.sharded.call import call_sharded
from moreh.runtime.engine.sharded.optimizers import norm_over_ranks, support_optimizer
from moreh.runtime.engine.sharded.registry import runner_of, whole_model

_supports_optimizers = False
_answers_calls = False


def support_optimizers_and_clipping() -> None:
    """Let optimizers and gradient clipping work on sharded models. Call it before the script makes its optimizer.

    Calls of sharded models in a backward pass are refused from then on. A second call does nothing.
    """
    global _supports_optimizers
    if not _supports_optimizers:
        _supports_optimizers = True
        on_optimizer_created(support_optimizer)
        on_total_norm(norm_over_ranks)
        before_calls_in_backward(_refuse_call_in_backward)


def install_sharding_support() -> None:
    """Let `shard_model` be used without the hook: calls of sharded models are answered, too.

    A second call does nothing. Do not call it under the hook: `MultiWorkerHook.call` chooses the precision first, and
    calls `call_sharded` itself.
    """
    global _answers_calls
    support_optimizers_and_clipping()
    if not _answers_calls:
        _answers_calls = True
        instead_of_model_calls(call_sharded)


def _refuse_call_in_backward(module: nn.Module) -> None:
    """Refuse a script's call of a sharded model in a backward pass, such as recomputation makes.

    Raises:
        OptionError: the module is a sharded model.
    """
    if runner_of(whole_model(module)) is not None:
        raise OptionError(recomputed_call("torch.utils.checkpoint (use_reentrant=True) or a hook in the backward pass"))
