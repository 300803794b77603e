"""Calls, graphs and modules that several workers refuse, or compute as one worker does."""

import copy
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from moreh.planner.plan.plan import Plan
from moreh.runtime.engine.sharded.install import install_sharding_support
from moreh.runtime.engine.sharded.registry import check_not_sharded, whole_model
from moreh.runtime.engine.sharded.shard_model import shard_model
from tests.helpers.batches import batch
from tests.helpers.models.families import make_model
from tests.helpers.sharded.cases import error_of, sharded_copy, weight_difference


def errors_of_calls(plan):
    """The errors of a whole and of a sharded model for wrong ids and other calls, and losses in between."""
    whole, sharded, _ = sharded_copy("llama", plan)
    ids, _, labels = batch(0, whole.config.vocab_size)
    beyond, negative = ids.clone(), ids.clone()
    beyond[-1, 3], negative[0, 0] = whole.config.vocab_size, -2
    wrong_labels = labels.clone()
    wrong_labels[-1, 3] = whole.config.vocab_size
    embedding = sharded.get_input_embeddings()

    def wrong(model):
        calls = [
            lambda: model(input_ids=beyond, labels=labels),
            lambda: model(input_ids=negative, labels=labels),
            lambda: model(input_ids=ids, labels=wrong_labels),
            torch.no_grad()(lambda: model(input_ids=beyond)),
            torch.no_grad()(lambda: model(input_ids=ids, labels=wrong_labels)),
        ]
        return [error_of(call) for call in calls]

    def loss(model):
        return model(input_ids=ids, labels=labels).loss.item()

    expected, actual = wrong(whole), wrong(sharded)
    cache = error_of(lambda: sharded(input_ids=ids, labels=labels, past_key_values=DynamicCache()))
    embedding.neftune_noise_alpha = 5.0
    noise = error_of(lambda: sharded(input_ids=ids, labels=labels))
    losses = [loss(model.eval()) for model in (whole, sharded)]  # where NEFTune adds no noise
    return expected, actual, cache, noise, losses


def errors_of_caches(plan):
    """The errors of uses of the cache in a sharded model's outputs, and the fields of its outputs and a whole model's.

    A tuple of two lists: of errors, and of pairs of fields.
    """
    whole, sharded, _ = sharded_copy("llama", plan)
    whole, sharded = whole.eval(), sharded.eval()
    ids, _, labels = batch(0, whole.config.vocab_size)
    calls = [
        lambda model: model(ids, labels=labels),
        lambda model: model(ids),
        lambda model: model(ids, labels=labels, use_cache=False),
        lambda model: model(ids, use_cache=False),
    ]
    with torch.no_grad():
        fields = [(list(call(whole)), list(call(sharded))) for call in calls]
        lengths = [len(model(ids, labels=labels, return_dict=False)) for model in (whole, sharded)]
        unread, cache = sharded(ids, labels=labels), sharded(ids).past_key_values
        errors = [
            error_of(lambda: sharded(ids[:, -1:], past_key_values=cache)),
            error_of(lambda: whole(ids[:, -1:], past_key_values=cache)),
            error_of(lambda: unread.past_key_values.get_seq_length()),
            error_of(lambda: list(cache)),
            error_of(lambda: cache[0]),
            error_of(lambda: len(cache)),
        ]
    assert not hasattr(cache, "dtype")
    assert copy.deepcopy(cache)
    return errors, [*fields, lengths]


def errors_of_wrappers(plan):
    """The errors of wrappers around a sharded model, and whether its compiled version counts as the model itself."""
    _, sharded, _ = sharded_copy("llama", plan)
    compiled = torch.compile(sharded, backend="eager")
    adapted = get_peft_model(sharded, LoraConfig(r=2, target_modules=["q_proj"]))
    return [error_of(lambda: check_not_sharded(adapted))], whole_model(compiled) is sharded


def errors_of_earlier_graphs(plan):
    """The errors of backward passes through graphs from before the sharding, and the gradients after them."""
    install_sharding_support()
    model = make_model("llama")
    ids, _, labels = batch(0, model.config.vocab_size)
    graphs = {
        "penalty": sum(p.pow(2).sum() for p in model.parameters()),
        "sum": sum(p.sum() for p in model.parameters()),
        "logits": model(input_ids=ids).logits.sum(),
        "last layer": model.lm_head.weight.sum(),
    }
    shard_model(model, Plan(**plan))
    model(input_ids=ids, labels=labels).loss.backward()
    before = [p.grad.norm().item() for p in model.parameters()]
    errors = {name: error_of(graph.backward) for name, graph in graphs.items()}
    return errors, before == [p.grad.norm().item() for p in model.parameters()]


class Counting(torch.nn.Module):
    """Counts the calls of a norm, or keeps a result of it, as `kind` says."""

    def __init__(self, norm, kind):
        super().__init__()
        self.norm, self.kind, self.calls, self.history, self.kept = norm, kind, 0, [], None
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, hidden_states):
        if self.kind == "number":
            self.calls += 1
        elif self.kind == "buffer":
            self.seen.add_(1)
        elif self.kind == "list":
            self.history.append(len(hidden_states))
        elif self.kind == "result":
            self.kept = hidden_states.square().mean()
        return self.norm(hidden_states)


def error_of_counting(plan, kind):
    install_sharding_support()
    model = make_model("llama")
    model.model.layers[-1].post_attention_layernorm = Counting(model.model.layers[-1].post_attention_layernorm, kind)
    shard_model(model, Plan(**plan))
    ids, _, labels = batch(0, model.config.vocab_size)
    return error_of(lambda: model(input_ids=ids, labels=labels).loss.backward())


def errors_of_recomputed_calls(plan):
    """The errors of calls inside of torch's recomputation, and of an operation counter; two losses around them."""
    whole, sharded, _ = sharded_copy("llama", plan)
    ids, _, labels = batch(0, whole.config.vocab_size)
    anchor = torch.zeros((), requires_grad=True)

    def loss(_=None):
        return sharded(input_ids=ids, labels=labels).loss

    def counted():
        with FlopCounterMode(display=False):
            loss()

    first = loss().item()
    errors = [
        error_of(lambda: checkpoint(loss, use_reentrant=False)),
        error_of(lambda: checkpoint(loss, anchor, use_reentrant=True).backward()),
        error_of(counted),
    ]
    return errors, [first, loss().item()]


def saved_from_inside_a_wrapper(plan):
    """The error of the wrapper's own `save_pretrained`, and the largest difference of what the model inside saves."""
    install_sharding_support()
    wrapped, whole = torch.nn.DataParallel(make_model("llama")), make_model("llama")
    ids, _, labels = batch(0, whole.config.vocab_size)
    runner = shard_model(wrapped, Plan(**plan))
    wrapped(input_ids=ids, labels=labels).loss.backward()
    torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
    directories = [tempfile.mkdtemp()]
    dist.broadcast_object_list(directories)
    error = error_of(lambda: wrapped.save_pretrained(directories[0]))
    wrapped.module.save_pretrained(directories[0])
    saved = load_file(Path(directories[0]) / "model.safetensors")
    whole.load_state_dict(saved)
    return error, weight_difference(runner.model, torch.nn.DataParallel(whole))
