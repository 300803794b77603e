"""Checks for calls that several workers cannot compute as one worker does."""

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import stateless

from moreh.errors import OptionError
from moreh.models.compatibility import compiled_module, embedding_option, inner_backward_hook, inner_hook, uses_neftune
from moreh.models.library_functions import LibraryFunctions
from moreh.models.losses import IGNORED_LABEL
from moreh.models.observers import observer_of_operations
from moreh.models.provenance import forward_counts
from moreh.runtime.batch.micro_batches import is_causal_model
from moreh.runtime.batch.model_inputs import CACHE_ARGUMENTS, ONE_WORKER, ModelInputs
from moreh.runtime.engine.parallel_model import ParallelModel
from moreh.runtime.sharding.mesh import Mesh
from moreh.trace import span


def check_modules(root: nn.Module) -> None:
    """Check that a script has no hooks on modules of a model, no compiled layers, and no options of its embeddings.

    Raises:
        OptionError: a hook would see one worker's part of the batch, and what it keeps or changes would be wrong; or
            layers are compiled one by one, for which neither communication nor faster kernels are made.
    """
    compiled = compiled_module(root)
    if compiled is not None:
        raise OptionError(
            f"{compiled} is compiled by itself: leave out its compile() on several workers, or {ONE_WORKER}"
        )
    option = embedding_option(root)
    if option is not None:
        raise OptionError(
            f"{option} counts, changes or lists the tokens of a whole batch, of which each worker has a part: leave it "
            f"out, or {ONE_WORKER}"
        )
    name = inner_hook(root)
    if name is not None:
        raise OptionError(
            f"a forward hook on {name} would see parts of the batch, and on some workers nothing: remove it, compute "
            f"what it gives from the logits, or {ONE_WORKER}"
        )
    name = inner_backward_hook(root)
    if name is not None:
        raise OptionError(
            f"a backward hook on {name or 'the whole model'} would see parts of the batch, and on some workers "
            f"nothing: remove it, or {ONE_WORKER}"
        )
    if _has_any_global_hook():
        raise OptionError(
            "a hook on all modules (torch.nn.modules.module.register_module_forward_hook and its like) would see parts "
            f"of the batch, and other modules than one worker has: remove it, or {ONE_WORKER}"
        )


def check_configuration(model: ParallelModel, *, was_causal: bool) -> None:
    """Check that a model computes all its layers, and that its tokens see those that they saw when it was sharded.

    Raises:
        OptionError: its configuration, or a module's `is_causal`, says otherwise.
    """
    causal: Any = model.parts.causal
    if is_causal_model(causal) != was_causal:
        raise OptionError(
            "is_causal was changed after the model was sharded over workers, which was done for the value before: set "
            f"it in model.config before the first training step, or {ONE_WORKER}"
        )
    layers = len(model.parts.layers)
    used = getattr(causal.config.get_text_config(), "num_hidden_layers", layers)
    if used < layers and model.plan.pipeline > 1:
        raise OptionError(
            f"config.num_hidden_layers is {used}, and the model has {layers} layers, which are divided among the "
            f"workers: remove the others from the model before its first training step, or {ONE_WORKER}"
        )


def check_thread() -> None:
    """Check that the main thread calls a model that several workers compute together.

    Raises:
        OptionError: another thread calls it. Its messages would mix with those of other calls, in another order on each
            worker.
    """
    if threading.current_thread() is not threading.main_thread():
        raise OptionError(
            "a model on several workers was called in a thread of the script's own, where calls of the "
            f"workers would meet in any order: call it in the main thread, or {ONE_WORKER}"
        )


def check_functional_call() -> None:
    """Check that the model that is to be sharded in a call has its own parameters.

    Raises:
        OptionError: the call is one of `torch.func.functional_call`, which has put others in their place.
    """
    functions = torch.func.functional_call, inspect.unwrap(stateless.functional_call)
    frame: Any = sys._getframe()
    while frame is not None:
        if any(frame.f_code is function.__code__ for function in functions):
            raise OptionError(
                "the first training batch was given to a model by torch.func.functional_call, whose parameters would "
                f"be sharded in the place of the model's own: call the model itself first, or {ONE_WORKER}"
            )
        frame = frame.f_back


def check_functions(root: nn.Module, expected: LibraryFunctions) -> LibraryFunctions:
    """Check that no function of the libraries that a model computes with was replaced since `expected` was recorded.

    Returns the current functions. A model and its batches are cut for the functions at the time of sharding.

    Raises:
        OptionError: one was replaced.
    """
    if expected.are_unchanged():
        return expected
    actual = LibraryFunctions(root)
    replaced = next((name for name in actual.all_replaced if name not in expected.all_replaced), None)
    if replaced is not None:
        raise OptionError(
            f"{replaced} was replaced after the model was sharded over workers, which was done for the one "
            f"before: replace it before the first training step, or {ONE_WORKER}"
        )
    return actual


def check_surroundings() -> None:
    """Check the modes and hooks that the script has put around a call of a causal language model.

    Raises:
        OptionError: it would see, or compute once more, one worker's part of the call.
    """
    observer = observer_of_operations()
    if observer is not None:
        raise OptionError(recomputed_call(observer))


def recomputed_call(observer: str) -> str:
    """The message of a call in the middle of `observer`, which would go wrong on several workers."""
    return (
        f"a model was called inside of {observer}, which would see one worker's part of the computation: call the "
        "model outside of it (model.gradient_checkpointing_enable() or activation_recomputation=True saves the memory "
        f"of activations), or {ONE_WORKER}"
    )


def check_call(causal: Any, inputs: ModelInputs) -> None:
    """Check a call of a causal language model, of which every worker has the same arguments.

    Raises:
        IndexError: an id or a label is not in the vocabulary, as in torch.
        OptionError: the call hands a cache over, or its noise would be another than on one worker.
    """
    if given := [name for name in CACHE_ARGUMENTS if inputs.others.get(name) is not None]:
        raise OptionError(
            f"{given[0]}: "
            f"a model on several workers keeps no cache; leave it out and give the model all tokens, or {ONE_WORKER}"
        )
    if causal.training and uses_neftune(causal):
        raise OptionError(
            "NEFTune (neftune_noise_alpha): its noise depends on how a batch is cut and padded, and would be another "
            f"on several workers; switch it off, or {ONE_WORKER}"
        )
    # Torch's own error comes from the rank that embeds tokens only, and from none that has a part of the matrix.
    if has_wrong_ids(causal, inputs):
        raise IndexError("index out of range in self")
    if inputs.labels is not None:
        check_labels(inputs.labels, causal.get_output_embeddings().weight.shape[0])


@contextmanager
def refusing_counts(root: nn.Module, mesh: Mesh) -> Iterator[None]:
    """A block that computes a call; modules of the script's own must not have counted its passes. Collective.

    Raises:
        OptionError: one has, on whichever rank computes it: a number, a list or a buffer of it has changed, or a
            result that it keeps.
    """
    before = forward_counts(root)
    yield
    if not before:
        return
    names, after = list(before), forward_counts(root)
    changed = torch.tensor([before[name] != after.get(name) for name in names], dtype=torch.int32, device=mesh.device)
    with span("all_reduce_counts", changed.nbytes):
        mesh.all_reduce(changed)
    for name, count in zip(names, changed.tolist(), strict=True):
        if count:
            raise OptionError(
                f"{name} changed a number, a list, a tensor or a buffer of its own in the forward pass, which several "
                f"workers compute in several parts: it would not be what it is on one worker; {ONE_WORKER}"
            )


def has_wrong_ids(causal: Any, inputs: ModelInputs) -> bool:
    """True if a token id or a position is out of range, even at a token that no label depends on."""
    embeddings = causal.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    # GPT-2 embeds token types by the matrix of its vocabulary.
    for ids in (inputs.tensors.get(name) for name in ("input_ids", "token_type_ids")):
        if ids is not None and weight is not None and bool(_is_outside(ids, weight.shape[0]).any()):
            return True
    size = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
    numbers = inputs.tensors.get("position_ids")
    if size is None or (inputs.sequence_length <= size and numbers is None):
        return False
    tables = (module for module in causal.modules() if isinstance(module, nn.Embedding) and module is not embeddings)
    # Of rotary angles there is one for any number, and OPT, whose table is longer, counts from the mask.
    if not any(table.num_embeddings == size for table in tables):
        return False
    return inputs.sequence_length > size if numbers is None else bool(_is_outside(numbers, size).any())


def check_labels(labels: torch.Tensor, vocabulary_size: int) -> None:
    """Check that labels are token ids, or -100.

    Raises:
        IndexError: a label is neither, as in torch.
    """
    wrong = (labels != IGNORED_LABEL) & _is_outside(labels, vocabulary_size)
    if bool(wrong.any()):
        raise IndexError(f"Target {int(labels[wrong][0])} is out of bounds.")


def _is_outside(ids: torch.Tensor, vocabulary_size: int) -> torch.Tensor:
    return (ids < 0) | (ids >= vocabulary_size)
