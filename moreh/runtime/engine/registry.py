"""The sharded models of this process: a script calls, clips and optimizes them as if they were whole."""

import weakref
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from moreh.errors import OptionError
from moreh.models.compatibility import has_call_hooks, uses_fp16_loss_scaling
from moreh.models.introspection import unwrapped, wrappers
from moreh.models.library_functions import LibraryFunctions
from moreh.models.structure import check_structure, structure_of
from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.patches.module_call import before_calls_in_backward, instead_of_model_calls
from moreh.patches.optimizer_creation import on_optimizer_created, revisit_optimizers
from moreh.patches.total_norm import on_total_norm
from moreh.planner.plan.plan import Plan
from moreh.runtime.batch.loss_output import output_class_of, with_lazy_outputs
from moreh.runtime.batch.model_inputs import ONE_WORKER, check_same_on_all_ranks, read_inputs
from moreh.runtime.engine.calls.checks import (
    check_call,
    check_functions,
    check_surroundings,
    recomputed_call,
    refusing_counts,
)
from moreh.runtime.engine.calls.history import CallHistories
from moreh.runtime.engine.calls.logits import weight_versions
from moreh.runtime.engine.calls.recorded import mode_of
from moreh.runtime.engine.gradients import keep_earlier_grads
from moreh.runtime.engine.model_methods import replace_methods
from moreh.runtime.engine.model_runner import ModelRunner
from moreh.runtime.engine.user_parameters import keep_state_sharded, replace_params
from moreh.runtime.sharding.global_ops import total_norm
from moreh.runtime.sharding.global_tensor import GlobalTensor, GlobalView
from moreh.trace import span

# Keys in a `__dict__`: of the runner, the model's structure and the functions that it computes with, in a sharded
# model; of a weak reference to the sharded model, in the model of transformers that it wraps; of a mark, in a sharded
# model and in each of its modules.
_RUNNER = "_moreh_runner"
_STRUCTURE = "_moreh_structure"
_FUNCTIONS = "_moreh_functions"
_WHOLE = "_moreh_whole_model"
_IS_SHARDED = "_moreh_is_sharded"
_histories = CallHistories()
_runners: weakref.WeakSet[ModelRunner] = weakref.WeakSet()
_supports_optimizers = False
_answers_calls = False


def support_optimizers_and_clipping() -> None:
    """Let optimizers and gradient clipping work on sharded models. Call it before the script makes its optimizer.

    Calls of sharded models in a backward pass are refused from then on. A second call does nothing.
    """
    global _supports_optimizers
    if not _supports_optimizers:
        _supports_optimizers = True
        on_optimizer_created(_check_supported)
        on_total_norm(_total_norm)
        before_calls_in_backward(_check_call_in_backward)


def install_sharding_support() -> None:
    """Let `shard_model` be used without the hook: calls of sharded models are answered, too.

    A second call does nothing. Do not call it under the hook: there `MultiWorkerHook.call` decides about every call and
    asks `call_sharded` itself, because it chooses the precision first.
    """
    global _answers_calls
    support_optimizers_and_clipping()
    if not _answers_calls:
        _answers_calls = True
        instead_of_model_calls(call_sharded)


def shard_model(root: nn.Module, plan: Plan, options: ParallelOptions = DEFAULT_OPTIONS) -> ModelRunner:
    """Shard a model over all ranks as the plan says, and its optimizers with it; collective.

    Raises:
        OptionError: the model cannot be computed on several workers.
        PlanError: tensor parallelism cannot split the model as the plan says.
    """
    with span("shard_model"):
        originals = dict(root.named_parameters())
        runner = ModelRunner(root, plan, options)
        parameters = runner.model.user_params
        keep_earlier_grads(runner.model, originals)
        replace_params({id(p): parameters[name] for name, p in originals.items()}, list(originals.values()))
        _runners.add(runner)
        revisit_optimizers()
        replace_methods(runner.model)
        for module in (*wrappers(root), unwrapped(root)):
            module.__dict__.update(__deepcopy__=_refuse_copy, __reduce_ex__=_refuse_pickling)
        root.__dict__[_RUNNER] = runner
        if unwrapped(root) is not root:
            unwrapped(root).__dict__[_WHOLE] = weakref.ref(root)
        for module in root.modules():
            module.__dict__[_IS_SHARDED] = True
        root.__dict__.update({_STRUCTURE: structure_of(root), _FUNCTIONS: LibraryFunctions(root)})
    return runner


def runner_of(root: nn.Module) -> ModelRunner | None:
    """What `shard_model` made of a model; None if the model is not sharded."""
    return root.__dict__.get(_RUNNER)


def whole_model(module: nn.Module) -> nn.Module:
    """The sharded model that wraps a model of transformers, whose call means the same; any other module itself.

    PEFT's `generate`, for example, calls the model inside.
    """
    reference = module.__dict__.get(_WHOLE)
    root = None if reference is None else reference()
    return module if root is None else root


def is_submodule_of_sharded(module: nn.Module) -> bool:
    """Whether a module is a part of a sharded model, and not the model itself."""
    return _IS_SHARDED in module.__dict__ and _RUNNER not in module.__dict__


def call_sharded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a sharded model returns for a batch; NotImplemented for a module that is not sharded.

    Raises:
        OptionError: the module is a part of a sharded model, or the script has changed what the model consists of, or
            modules of the script's own have counted the call.
    """
    module = whole_model(module)
    runner = runner_of(module)
    if runner is not None:
        check_structure(module, module.__dict__[_STRUCTURE])
        module.__dict__[_FUNCTIONS] = check_functions(module, module.__dict__[_FUNCTIONS])
        with refusing_counts(module, runner.model.mesh):
            return _answer(runner, args, kwargs)
    if is_submodule_of_sharded(module):
        raise OptionError(
            f"a {type(module).__name__} inside a model that is sharded over workers was called by itself: "
            "call the whole model"
        )
    return NotImplemented


def _check_call_in_backward(module: nn.Module) -> None:
    """Refuse a script's call of a sharded model in a backward pass, such as recomputation makes.

    Raises:
        OptionError: the module is a sharded model.
    """
    if runner_of(whole_model(module)) is not None:
        raise OptionError(recomputed_call("torch.utils.checkpoint (use_reentrant=True) or a hook in the backward pass"))


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


def _answer(runner: ModelRunner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a sharded model returns for the whole batch, which every rank is called with; collective.

    Raises:
        IndexError: an id or a label is not in the vocabulary.
        OptionError: the call asks for what a sharded model cannot give.
        WorkerError: the ranks were called with different batches.
    """
    model = runner.model
    causal: Any = model.parts.causal
    if has_call_hooks(model.parts.root):
        raise OptionError(f"a forward hook on the whole model would see no worker's call of it: {ONE_WORKER}")
    if model.plan.devices > 1:
        check_surroundings()
    as_tuple, output_class = kwargs.get("return_dict") is False, output_class_of(causal)
    with span("check_inputs"):
        inputs = read_inputs(causal, args, kwargs)
        if model.plan.devices > 1:
            check_same_on_all_ranks(inputs, model.mesh.device)
            check_call(causal, inputs)
    if torch.is_grad_enabled() and uses_fp16_loss_scaling(model.mesh.device):
        raise OptionError(
            "training in float16: gradients are computed in the call, before the script scales the loss, and most "
            f"would vanish; use bfloat16, or {ONE_WORKER}"
        )
    if inputs.labels is None:
        logits = runner.logits(inputs)
        return (logits,) if as_tuple else output_class(logits=logits)
    history = _histories.of(model.parts.root)
    history.add_call()
    if as_tuple or history.needs_own_forward:
        loss, logits = runner.loss_and_logits(inputs)
        return (loss, logits) if as_tuple else output_class(loss=loss, logits=logits)
    loss = runner.loss(inputs)
    as_in_call = mode_of(model.parts.root, model.mesh.device.type)
    versions, with_grads = weight_versions(model), torch.is_grad_enabled()

    def compute_logits() -> Any:
        if weight_versions(model) != versions:
            raise OptionError(
                "outputs other than the loss are computed when they are asked for, and the weights have changed since "
                "the call: read them before the optimizer's step"
            )
        history.add_read(late=False)
        # The script's generator goes on from where the call has left it.
        with torch.random.fork_rng([]), as_in_call(), torch.set_grad_enabled(with_grads):
            return CausalLMOutputWithPast(logits=runner.logits(inputs))

    return with_lazy_outputs(output_class, loss, compute_logits)


def _check_supported(optimizer: torch.optim.Optimizer) -> None:
    """Refuse torch's optimizers that are wrong on shards, and keep the state of the others sharded.

    Adafactor's means of rows and columns are kept whole, beside parameters that are not. L-BFGS takes dot products of
    all parameters together, which it gathers first.

    Raises:
        OptionError: the optimizer is an L-BFGS or Adafactor of a sharded model.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    models = [r.model for r in _runners if any(id(parameter) in own for parameter in r.model.user_params.values())]
    if not models:
        return
    keep_state_sharded(optimizer)
    has_shards = any(model.plan.tensor > 1 or model.uses_fsdp for model in models)
    if isinstance(optimizer, torch.optim.LBFGS) and (has_shards or any(model.plan.pipeline > 1 for model in models)):
        raise OptionError("LBFGS looks at all parameters together, which are sharded over workers: use AdamW or SGD")
    if isinstance(optimizer, torch.optim.Adafactor) and has_shards:
        raise OptionError(
            "Adafactor looks at rows and columns of matrices, which are sharded over workers: use AdamW or SGD"
        )


def _total_norm(grads: list[torch.Tensor], norm_type: float) -> torch.Tensor | None:
    """The norm over all ranks of gradients, a sharded model's among them, in one message; None if there are none."""
    ids = {id(grad) for grad in grads}
    runners = [
        r for r in _runners if any(id(p.grad) in ids for p in r.model.user_params.values() if p.grad is not None)
    ]
    meshes = [runner.model.mesh for runner in runners]
    meshes += [grad.global_layout.mesh for grad in grads if isinstance(grad, GlobalTensor)]
    if not meshes or not norm_type > 0:
        return None
    with span("clip_total_norm"):
        return total_norm([g.full_tensor() if isinstance(g, GlobalView) else g for g in grads], norm_type, meshes[0])
