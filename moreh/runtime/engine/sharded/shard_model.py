"""Shards a model over all ranks, and replaces its parameters in the script's optimizers."""

from typing import Any, NoReturn

from torch import nn

from moreh.errors import OptionError
from moreh.models.introspection import unwrapped, wrappers
from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.patches.optimizer_creation import revisit_optimizers
from moreh.planner.plan.plan import Plan
from moreh.runtime.engine.gradients import keep_earlier_grads
from moreh.runtime.engine.model_runner import ModelRunner
from moreh.runtime.engine.sharded.call import remember_computation
from moreh.runtime.engine.sharded.earlier_aliases import aliases_of, check_arrays, replace_aliases
from moreh.runtime.engine.sharded.model_methods import replace_methods
from moreh.runtime.engine.sharded.registry import register
from moreh.runtime.engine.sharded.user_parameters import replace_params
from moreh.trace import span


def shard_model(root: nn.Module, plan: Plan, options: ParallelOptions = DEFAULT_OPTIONS) -> ModelRunner:
    """Shard a model over all ranks as the plan says, and its optimizers with it; collective.

    Raises:
        OptionError: the model cannot be computed on several workers, or a NumPy array shares memory with it.
        PlanError: tensor parallelism cannot split the model as the plan says.
    """
    with span("shard_model"):
        originals = dict(root.named_parameters())
        check_arrays(originals)
        aliases = aliases_of(originals)
        runner = ModelRunner(root, plan, options)
        parameters = runner.model.user_params
        keep_earlier_grads(runner.model, originals)
        replace_params({id(p): parameters[name] for name, p in originals.items()}, list(originals.values()))
        replace_aliases(aliases, parameters)
        register(root, runner)
        revisit_optimizers()
        replace_methods(runner.model)
        for module in (*wrappers(root), unwrapped(root)):
            module.__dict__.update(__deepcopy__=_refuse_copy, __reduce_ex__=_refuse_pickling)
        remember_computation(root)
    return runner


def _refuse_copy(memo: Any) -> NoReturn:
    raise OptionError(
        "a model that is sharded over workers was copied, as copy.deepcopy and AveragedModel do: copy it before its "
        "first training step, or keep {name: p.detach().clone() for name, p in model.named_parameters()}"
    )


def _refuse_pickling(protocol: Any) -> NoReturn:
    raise OptionError(
        "a model that is sharded over workers was pickled, as torch.save(model) does: save it with "
        "model.save_pretrained(directory)"
    )
