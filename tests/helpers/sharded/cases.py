"""The work of each rank in the tests of sharded models: the same with a whole and a sharded model, to compare them."""

import copy
import functools
import weakref
from contextlib import ExitStack, contextmanager
from unittest import mock

import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.pipelining.stage import _RecvInfo

from moreh.planner.plan.plan import Plan
from moreh.runtime.batch import packing
from moreh.runtime.engine.sharded.install import install_sharding_support
from moreh.runtime.engine.sharded.shard_model import shard_model
from moreh.runtime.pipeline import lean_stage
from moreh.runtime.pipeline.lean_stage import LeanPipelineStage
from moreh.runtime.sharding.gather import full_tensor
from moreh.runtime.sharding.rng import rank_local_rng
from tests.helpers.batches import LENGTH, ROWS, batch, batch_with_shared_prefix, label_positions_rounded_to
from tests.helpers.compare import curve_difference, max_difference, worst
from tests.helpers.float64 import exact_float64
from tests.helpers.models.families import make_model
from tests.helpers.plans.faults import FAULTS
from tests.helpers.plans.training import new_model
from tests.helpers.sharded.loop import train


def compare(
    family, plan, change=None, *, settings=None, positions_multiple=4, fault=None, precision=exact_float64, **loop
):
    """Train a sharded and a whole model: the largest relative difference of losses and norms, and that of a weight.

    `precision` makes the context in which both compute.
    """
    install_sharding_support()
    initial, expected, whole = _trained_whole(
        family, change, tuple((settings or {}).items()), positions_multiple, precision, tuple(loop.items())
    )
    sharded = copy.deepcopy(initial)
    with precision(), label_positions_rounded_to(positions_multiple):
        runner = shard_model(sharded, Plan(**plan))
        with FAULTS[fault]():
            curve = train(sharded, **loop)
    return curve_difference(curve, expected), weight_difference(runner.model, whole)


@functools.cache
def _trained_whole(family, change, settings, positions_multiple, precision, loop):
    """A model that was not trained, the losses and norms of a training, and the model that it gives."""
    initial = make_model(family, **dict(settings))
    if change is not None:
        initial = change(initial)
    whole = copy.deepcopy(initial)
    with precision(), label_positions_rounded_to(positions_multiple):
        return initial, train(whole, **dict(loop)), whole


def compare_with_shared_prefix(family, plan, assumed_prefix_len=None):
    """The same for rows that begin alike, and the prefix lengths that were found; others are used if they are given."""
    found = []

    def pack(*arguments):
        found.append(arguments[-1])
        prefix_len = arguments[-1] if assumed_prefix_len is None else assumed_prefix_len
        return packing.pack_micro_batches(*arguments[:-1], prefix_len)

    with mock.patch("moreh.runtime.batch.batch_cutter.pack_micro_batches", pack):
        return *compare(family, plan, make_batch=batch_with_shared_prefix), set(found)


def weight_difference(parallel, whole):
    """The largest difference of a weight of a sharded model from that of a whole one."""
    local = parallel.local_tensors()
    expected = dict(whole.named_parameters())
    return worst(
        max_difference(full_tensor(spec, local.get(name), parallel.mesh), expected[name])
        for name, spec in parallel.specs.items()
    )


def sharded_copy(family, plan, **settings):
    """A whole model, a sharded copy, and the copy's runner."""
    install_sharding_support()
    whole = make_model(family, **settings)
    sharded = copy.deepcopy(whole)
    return whole, sharded, shard_model(sharded, Plan(**plan))


def sharding_error(family, plan, **settings):
    """The error for a plan that cannot shard a model."""
    return error_of(lambda: sharded_copy(family, plan, **settings))


def error_of(function):
    """The text of the error that a function raises; None without one."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def errors_of_other_computations(plan):
    """The errors for models that compute more than their layers and the usual loss."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import LlamaForCausalLM

    class OwnForward(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.loss = 2 * outputs.loss
            return outputs

    own = make_model("llama")
    own.__class__ = OwnForward
    prompted = get_peft_model(make_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    return [error_of(lambda model=model: shard_model(model, Plan(**plan))) for model in (own, prompted)]


def gradients_after_freezing(plan):
    """How many parameters get a gradient after all but one were frozen on a model that is sharded already."""
    _, model, runner = sharded_copy("llama", plan)
    user_params = runner.model.user_params
    for parameter in user_params.values():
        parameter.requires_grad_(False)
    next(iter(user_params.values())).requires_grad_(True)
    ids, _, labels = batch(0, model.config.vocab_size)
    model(input_ids=ids, labels=labels).loss.backward()
    return sum(parameter.grad is not None for parameter in user_params.values())


@label_positions_rounded_to(4)
def backward_variants(family, plan, nan_on_rank=None):
    """Weights after what scripts do with a loss: scaled, summed with another, left unused, used twice.

    Returns the difference and the error of the second use. `nan_on_rank` makes the gradient of a matrix NaN there.
    """
    whole, sharded, runner = sharded_copy(family, plan)
    ids, mask, labels = batch(0, whole.config.vocab_size)
    others = batch(1, whole.config.vocab_size)
    twice = None
    with exact_float64():
        for model in (whole, sharded):
            model(input_ids=others[0], attention_mask=others[1], labels=others[2])  # a loss that nobody asks about
            first = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            second = model(input_ids=others[0], attention_mask=others[1], labels=others[2])["loss"]
            (3 * first + second / 7).backward()
            third = model(ids, attention_mask=mask, labels=labels, return_dict=False)[0]
            third.backward()
            twice = error_of(third.backward)
            if model is sharded and nan_on_rank == dist.get_rank():
                model.transformer.h[-1].mlp.c_fc.weight.grad.mul_(float("nan"))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            torch.optim.SGD(model.parameters(), lr=1.0).step()
    return weight_difference(runner.model, whole), twice


@label_positions_rounded_to(4)
def outputs_without_gradients(family, plan, nan_on_rank=None):
    """Logits of a whole batch and of its last positions, losses of an odd number of rows, and generated tokens.

    Returns the largest difference from a whole model's, whether the tokens are the same, and whether a model was left
    in training mode. `nan_on_rank` makes a logit NaN.
    """
    whole, sharded, _ = sharded_copy(family, plan)
    # Sequence parallelism pads rows of this length, and the last row is as long.
    ids, mask, labels = batch(0, whole.config.vocab_size, rows=3, length=13)
    results = []
    for model in (whole.eval(), sharded.eval()):
        with torch.no_grad(), exact_float64():
            logits = model(input_ids=ids, attention_mask=mask).logits
            last_logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=2).logits
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss_of_seven = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=7).loss
        torch.manual_seed(0)
        tokens = model.generate(
            ids[:1, :4], attention_mask=mask[:1, :4], max_new_tokens=6, do_sample=True, pad_token_id=0
        )
        if model is sharded and nan_on_rank == dist.get_rank():
            logits = logits.index_fill(0, torch.tensor([1]), float("nan"))
        results.append((logits, last_logits, loss, loss_of_seven, tokens))
    (*expected, expected_tokens), (*actual, tokens) = results
    difference = worst(
        max_difference(_without_padding(a, mask), _without_padding(b, mask))
        for a, b in zip(actual, expected, strict=True)
    )
    return difference, tokens.tolist() == expected_tokens.tolist(), whole.training or sharded.training


def _without_padding(tensor, mask):
    """The elements of a result that do not come from padding."""
    return tensor[mask[:, -tensor.shape[1] :].bool()] if tensor.dim() == 3 else tensor


def refusals(plan):
    """The errors of a sharded model for calls that it cannot answer."""
    _, model, _ = sharded_copy("gpt2", plan)
    ids, mask, labels = batch(0, model.config.vocab_size)
    rank = dist.get_rank()
    calls = {
        "hidden states": lambda: model(input_ids=ids, labels=labels, output_hidden_states=True),
        "part": lambda: model.transformer(ids),
        "batches": lambda: model(input_ids=ids.roll(rank), labels=labels),
        "nothing": lambda: model(attention_mask=mask),
        "safetensors": lambda: safetensors.torch.save(model.state_dict()),
        "assign": lambda: model.load_state_dict(model.state_dict(), assign=True),
        "other weights": lambda: model.save_pretrained(
            "unused", state_dict={name: tensor.clone() for name, tensor in model.state_dict().items()}
        ),
        "adafactor": lambda: torch.optim.Adafactor(model.parameters()),
        "lbfgs": lambda: torch.optim.LBFGS(model.parameters()),
        "cache": lambda: model.generate(ids[:1], past_key_values=object()),
        "ignored label": lambda: model(input_ids=ids, labels=labels, ignore_index=0),
        "adapters of rows": lambda: model(input_ids=ids, labels=labels, adapter_names=["a"] * ROWS),
        "mask": lambda: model(input_ids=ids, labels=labels, attention_mask=mask[:2]),
        "no token": lambda: model(input_ids=ids, labels=labels.masked_fill(labels == -100, -1)),
        "float16": lambda: _in_float16(lambda: model(input_ids=ids, labels=labels)),
    }
    errors = {name: error_of(call) for name, call in calls.items()}
    model.register_forward_hook(lambda module, inputs, outputs: None)
    return errors | {"hook": error_of(lambda: model(input_ids=ids, labels=labels))}


def _in_float16(call):
    with torch.autocast("cpu", dtype=torch.float16):
        return call()


def gradient_hook_errors(plan):
    install_sharding_support()
    model = make_model("gpt2")
    node = torch.autograd.graph.get_gradient_edge(model.lm_head.weight).node
    handle = node.register_prehook(lambda gradients: None)
    errors = [error_of(lambda: shard_model(model, Plan(**plan)))]
    handle.remove()
    model.lm_head.weight.register_hook(lambda gradient: gradient)
    return [*errors, error_of(lambda: shard_model(model, Plan(**plan)))]


def dropout_draws(plan):
    """Numbers that ranks draw while they compute, and what the script's generator gives afterwards."""
    _, _, runner = sharded_copy("gpt2", plan)
    mesh = runner.model.mesh
    torch.manual_seed(5)
    draws = []
    for _ in range(2):
        with rank_local_rng(mesh, is_random=True):
            draws.append(torch.rand(dist.get_rank() + 1)[0].item())
    return draws, torch.rand(1).item(), (mesh.rank("pipeline"), mesh.rank("data"), mesh.rank("tensor"))


@label_positions_rounded_to(4)
def dropout_loss(plan):
    """Losses of a training with dropout: of two runs with one seed, and of one with another."""
    losses = []
    for seed in (0, 0, 1):
        _, model, _ = sharded_copy("gpt2", plan, resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
        torch.manual_seed(seed)
        losses.append(train(model, steps=2))
    return losses


def received_at_once(family, plan, frees_buffers):
    """The hidden states and gradients that this pipeline rank receives in two batches of different lengths.

    Returns how many, how many of them exist at once, and the lengths. No buffer is freed if `frees_buffers` is false.
    """
    install_sharding_support()
    model = new_model(family)
    shard_model(model, plan)
    received, most, lengths = [], 0, set()
    receive_buffers = LeanPipelineStage._receive_buffers

    @contextmanager
    def counted(stage, infos):
        nonlocal most
        with receive_buffers(stage, infos):
            yield
        buffers = [info.buffer for info in infos]
        received.extend(map(weakref.ref, buffers))
        lengths.update(buffer.shape[1] for buffer in buffers)
        most = max(most, sum(reference() is not None for reference in received))

    with mock.patch.object(LeanPipelineStage, "_receive_buffers", counted), ExitStack() as faults:
        if not frees_buffers:
            faults.enter_context(mock.patch.object(lean_stage, "_free_buffers", return_value=None))
            if hasattr(_RecvInfo, "take_buffer"):  # torch since 2.15 frees them, too
                faults.enter_context(mock.patch.object(_RecvInfo, "take_buffer", lambda info: info.buffer))
        for length in (LENGTH, LENGTH - 4):
            ids = torch.arange(ROWS * length).view(ROWS, length) % model.config.vocab_size
            # Nothing is packed where padding is in front.
            mask = torch.ones_like(ids)
            mask[0, 0] = 0
            model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    return len(received), most, lengths
