"""What each rank does in the tests of divided models: a script's own loop, on a whole model and on a divided one."""

import copy
import io
import weakref
from unittest import mock

import torch
import torch.distributed as dist

from moreh.planner.plan.plan import Plan
from moreh.runtime.batch import micro_batches, packing
from moreh.runtime.engine.checkpoint_api import load_training, save_training
from moreh.runtime.engine.registry import install_sharding_support, shard_model
from moreh.runtime.pipeline import lean_stage as pipeline_stage
from moreh.runtime.pipeline.lean_stage import LeanPipelineStage
from moreh.runtime.sharding.gather import full_tensor
from tests.helpers.family_settings import FAMILY_SETTINGS
from tests.helpers.float64 import exact_float64
from tests.helpers.plan_training import new_model
from tests.helpers.tensor_cases import whole_model

ROWS, LENGTH = 8, 12
# Filled up to the multiple of real batches, the label positions of these would be all positions.
micro_batches.POSITIONS_MULTIPLE = 4


def batch(step, vocabulary, rows=ROWS, length=LENGTH):
    """Ids, mask and labels of rows with different lengths, of whose beginning nothing is a label."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return ids, mask, labels


def rows_that_begin_alike(step, vocabulary):
    """The same with five tokens in front of each row, without labels."""
    ids, mask, labels = batch(step, vocabulary)
    prefix = torch.arange(5).expand(ROWS, 5)
    return tuple(
        torch.cat(pair, 1) for pair in ((prefix, ids), (torch.ones_like(prefix), mask), (0 * prefix - 100, labels))
    )


def train(model, optimizer_of=None, clip=None, steps=3, accumulation=2, make_batch=batch, **model_arguments):
    """The loop of a script, and what it sees: losses and norms. Everything is made before the first batch."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make = optimizer_of or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3))
    optimizer = make(parameters)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, steps)
    clip = clip or (lambda model, parameters: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    seen = []
    for step in range(steps):
        for part in range(accumulation):
            ids, mask, labels = make_batch(accumulation * step + part, model.config.vocab_size)
            outputs = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, **model_arguments)
            (outputs[0] / accumulation).backward()
            seen.append(outputs.loss.item())
        seen.append(float(clip(model, parameters)))
        optimizer.step()
        scheduler.step()
        model.zero_grad(set_to_none=True)
    return seen


def compare(family, plan, change=None, **loop):
    """The greatest relative difference of losses and norms, and of weights, between a divided model and a whole one."""
    install_sharding_support()
    model = whole_model(family, FAMILY_SETTINGS.get(family, {}))
    if change is not None:
        model = change(model)
    divided = copy.deepcopy(model)
    with exact_float64():
        expected = train(model, **loop)
        model_runner = shard_model(divided, Plan(**plan))
        seen = train(divided, **loop)
    seen_difference = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(seen, expected, strict=True))
    return seen_difference, weight_difference(model_runner.model, model)


def compare_rows_that_begin_alike(family, plan, seen_as=None):
    """The same for these, and the numbers of tokens that were computed once; `seen_as` instead of them, if given."""
    shared = []

    def pack(*given):
        shared.append(given[-1])
        return packing.pack_micro_batches(*given[:-1], given[-1] if seen_as is None else seen_as)

    with mock.patch("moreh.runtime.engine.model_runner.pack_micro_batches", pack):
        return *compare(family, plan, make_batch=rows_that_begin_alike), set(shared)


def weight_difference(parallel, whole):
    """The greatest difference of a weight of a divided model from that of a whole one."""
    local = parallel.local_tensors()
    expected = dict(whole.named_parameters())
    difference = 0.0
    for name, layout in parallel.layouts.items():
        gathered = full_tensor(layout, local.get(name), parallel.mesh)
        difference = max(difference, float((gathered - expected[name]).detach().abs().max()))
    return difference


def divided_model(family, plan, **changes):
    """A whole model and a divided copy."""
    install_sharding_support()
    model = whole_model(family, FAMILY_SETTINGS.get(family, {}) | changes)
    divided = copy.deepcopy(model)
    return model, divided, shard_model(divided, Plan(**plan))


STEPS, STEPS_BEFORE = 4, 2


def _parts(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)


def _steps(model, optimizer, scheduler, steps):
    """Losses, norms and learning rates of some steps."""
    seen = []
    with exact_float64():
        for step in steps:
            ids, mask, labels = batch(step, model.config.vocab_size)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            seen += [
                loss.item(),
                float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)),
                scheduler.get_last_lr()[0],
            ]
            optimizer.step()
            scheduler.step()
            model.zero_grad()
    return seen


def train_and_save(family, plan, directory):
    """Some steps under a plan, and a checkpoint."""
    _, model, _ = divided_model(family, plan)
    optimizer, scheduler = _parts(model)
    seen = _steps(model, optimizer, scheduler, range(STEPS_BEFORE))
    save_training(model, [optimizer], directory, {"scheduler": scheduler.state_dict()}).result()
    return seen


def resume_and_train(family, plan, directory):
    """The other steps under another plan, compared with a whole model's training that was never interrupted."""
    whole, model, model_runner = divided_model(family, plan)
    whole_optimizer, whole_scheduler = _parts(whole)
    _steps(whole, whole_optimizer, whole_scheduler, range(STEPS_BEFORE))
    expected = _steps(whole, whole_optimizer, whole_scheduler, range(STEPS_BEFORE, STEPS))
    optimizer, scheduler = _parts(model)
    extra = load_training(model, [optimizer], directory)
    scheduler.load_state_dict(extra["scheduler"])
    seen = _steps(model, optimizer, scheduler, range(STEPS_BEFORE, STEPS))
    difference = max(abs(a - b) / abs(b) for a, b in zip(seen, expected, strict=True))
    return difference, weight_difference(model_runner.model, whole)


def interrupted_is_identical(plan, directory):
    """Whether a training that was saved and loaded into a new model ends with the bits of one that went through."""
    models = []
    for interrupted in (False, True):
        _, model, model_runner = divided_model("llama", plan, attention_dropout=0.2)
        optimizer, scheduler = _parts(model)
        torch.manual_seed(3)
        _steps(model, optimizer, scheduler, range(STEPS_BEFORE))
        if interrupted:
            state = {"scheduler": scheduler.state_dict(), "random": torch.get_rng_state()}
            save_training(model, [optimizer], directory, state).result()
            _, model, model_runner = divided_model("llama", plan, attention_dropout=0.2)
            optimizer, scheduler = _parts(model)
            torch.manual_seed(4)
            state = load_training(model, [optimizer], directory)
            scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["random"])
        _steps(model, optimizer, scheduler, range(STEPS_BEFORE, STEPS))
        models.append(model_runner.model.local_tensors())
    first, second = models
    return all(torch.equal(first[name], second[name]) for name in first)


def division_error(family, plan, **changes):
    """What is said to a plan that a model cannot be divided by."""
    return error_of(lambda: divided_model(family, plan, **changes))


def errors_of_other_computations(plan):
    """What is said to models that compute more than their layers and the usual loss."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import LlamaForCausalLM

    class OwnForward(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.loss = 2 * outputs.loss
            return outputs

    own = whole_model("llama", {})
    own.__class__ = OwnForward
    prompted = get_peft_model(whole_model("llama", {}), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    return [error_of(lambda model=model: shard_model(model, Plan(**plan))) for model in (own, prompted)]


def frozen_later(plan):
    """Whether a parameter that is frozen once the model is divided gets no gradient."""
    _, model, model_runner = divided_model("llama", plan)
    for parameter in model_runner.model.user_params.values():
        parameter.requires_grad_(False)
    next(iter(model_runner.model.user_params.values())).requires_grad_(True)
    ids, _, labels = batch(0, model.config.vocab_size)
    model(input_ids=ids, labels=labels).loss.backward()
    return sum(parameter.grad is not None for parameter in model_runner.model.user_params.values())


def error_of(function):
    """The text of the error that a function raises."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def fused_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, fused=True)


def sgd_with_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


class Layerwise(torch.optim.Optimizer):
    """An optimizer that looks at whole matrices: it moves each by a share of its norm, as LARS does."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    share = parameter.norm() / (parameter.grad.norm() + 1e-6)
                    parameter.sub_(parameter.grad * share * group["lr"])


def two_groups(parameters):
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    rest = [parameter for parameter in parameters if parameter.dim() <= 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, eps=1e-3)


def clip_listed(model, parameters):
    """Clipping of a list that was made before the model was divided."""
    return torch.nn.utils.clip_grad_norm_(parameters, 0.5)


def clip_largest(model, parameters):
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type=float("inf"))


def clip_output_layer(model, parameters):
    return torch.nn.utils.clip_grad_norm_(model.get_output_embeddings().parameters(), 0.1)


def freeze_some(model):
    """Embeddings and every second layer keep their weights."""
    for name, parameter in model.named_parameters():
        if "embed" in name or "wte" in name or ".1." in name:
            parameter.requires_grad_(False)
    return model


def backward_variants(family, plan):
    """Gradients after what scripts do with a loss: scaled, summed with another, left unused, used twice."""
    whole, divided, model_runner = divided_model(family, plan)
    ids, mask, labels = batch(0, whole.config.vocab_size)
    others = batch(1, whole.config.vocab_size)
    twice = None
    with exact_float64():
        for model in (whole, divided):
            model(input_ids=others[0], attention_mask=others[1], labels=others[2])  # a loss that nobody asks about
            first = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            second = model(input_ids=others[0], attention_mask=others[1], labels=others[2])["loss"]
            (3 * first + second / 7).backward()
            third = model(ids, attention_mask=mask, labels=labels, return_dict=False)[0]
            third.backward()
            twice = error_of(third.backward)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            torch.optim.SGD(model.parameters(), lr=1.0).step()
    return weight_difference(model_runner.model, whole), twice


def outputs_without_labels(family, plan):
    """Logits of a whole batch and of its last positions, the loss of an odd number of rows, and generated tokens."""
    whole, divided, _ = divided_model(family, plan)
    ids, mask, labels = batch(0, whole.config.vocab_size, rows=3)
    results = []
    for model in (whole.eval(), divided.eval()):
        with torch.no_grad(), exact_float64():
            logits = model(input_ids=ids, attention_mask=mask).logits
            last = model(input_ids=ids, attention_mask=mask, logits_to_keep=2).logits
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            shared = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=7).loss
        torch.manual_seed(0)
        text = model.generate(
            ids[:1, :4], attention_mask=mask[:1, :4], max_new_tokens=6, do_sample=True, pad_token_id=0
        )
        results.append((logits, last, loss, shared, text))
    (*expected, text), (*seen, divided_text) = results
    pairs = zip(expected, seen, strict=True)
    difference = max(float((a * causal_bias(a, mask) - b * causal_bias(b, mask)).abs().max()) for a, b in pairs)
    return difference, text.tolist() == divided_text.tolist(), whole.training or divided.training


def causal_bias(tensor, mask):
    """1 where a result does not come from padding."""
    return mask[:, -tensor.shape[1] :, None] if tensor.dim() == 3 else torch.ones(())


def refusals(plan):
    """What a divided model says to calls that it cannot answer."""
    _, model, _ = divided_model("gpt2", plan)
    ids, mask, labels = batch(0, model.config.vocab_size)
    rank = dist.get_rank()
    calls = {
        "no labels": lambda: model(input_ids=ids),
        "logits": lambda: model(input_ids=ids, labels=labels).logits,
        "hidden states": lambda: model(input_ids=ids, labels=labels, output_hidden_states=True),
        "part": lambda: model.transformer(ids),
        "batches": lambda: model(input_ids=ids.roll(rank), labels=labels),
        "nothing": lambda: model(attention_mask=mask),
        "pickle": lambda: torch.save(model.state_dict(), io.BytesIO()),
        "adafactor": lambda: torch.optim.Adafactor(model.parameters()),
        "lbfgs": lambda: torch.optim.LBFGS(model.parameters()),
        "cache": lambda: model.generate(ids[:1], past_key_values=object()),
        "ignored label": lambda: model(input_ids=ids, labels=labels, ignore_index=0),
        "adapters of rows": lambda: model(input_ids=ids, labels=labels, adapter_names=["a"] * ROWS),
        "mask": lambda: model(input_ids=ids, labels=labels, attention_mask=mask[:2]),
        "no token": lambda: model(input_ids=ids, labels=labels.masked_fill(labels == -100, -1)),
        "float16": lambda: in_float16(lambda: model(input_ids=ids, labels=labels)),
    }
    told = {name: error_of(call) for name, call in calls.items()}
    model.register_forward_hook(lambda module, given, outputs: None)
    return told | {"hook": error_of(lambda: model(input_ids=ids, labels=labels))}


def in_float16(call):
    with torch.autocast("cpu", dtype=torch.float16):
        return call()


def gradient_hook_error(plan):
    install_sharding_support()
    model = whole_model("gpt2", {})
    model.lm_head.weight.register_hook(lambda gradient: gradient)
    return error_of(lambda: shard_model(model, Plan(**plan)))


def dropout_draws(plan):
    """Numbers that ranks draw while they compute, and what the script's generator gives afterwards."""
    from moreh.runtime.sharding.rng import rank_local_rng

    install_sharding_support()
    _, _, model_runner = divided_model("gpt2", plan)
    torch.manual_seed(5)
    draws = []
    for _ in range(2):
        with rank_local_rng(model_runner.model.mesh):
            draws.append(torch.rand(dist.get_rank() + 1)[0].item())
    mesh = model_runner.model.mesh
    return draws, torch.rand(1).item(), (mesh.rank("pipeline"), mesh.rank("data"), mesh.rank("tensor"))


def dropout_loss(plan):
    """Losses of a training with dropout: of two runs with one seed, and of one with another."""
    losses = []
    for seed in (0, 0, 1):
        _, model, _ = divided_model("gpt2", plan, resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
        torch.manual_seed(seed)
        losses.append(train(model, steps=2))
    return losses


def received_at_once(family, plan, lets_go):
    """How many hidden states and gradients this rank of a pipeline receives in two batches of different lengths, how many of
    them exist at once, and the lengths. Nothing is let go of if `lets_go` is false.
    """
    install_sharding_support()
    model = new_model(family)
    shard_model(model, plan)
    received, most, lengths = [], 0, set()
    make_room, let_go = LeanPipelineStage._allocate_buffers, pipeline_stage._free_buffers

    def counted(stage, infos):
        nonlocal most
        make_room(stage, infos)
        received.extend(weakref.ref(info.buffer) for info in infos)
        lengths.update(info.buffer.shape[1] for info in infos)
        most = max(most, sum(one() is not None for one in received))

    keep = mock.patch.object(pipeline_stage, "_free_buffers", let_go if lets_go else lambda infos: None)
    with mock.patch.object(LeanPipelineStage, "_allocate_buffers", counted), keep:
        for length in (LENGTH, LENGTH - 4):
            ids = torch.arange(ROWS * length).view(ROWS, length) % model.config.vocab_size
            # Nothing is packed where padding is in front.
            mask = torch.ones_like(ids)
            mask[0, 0] = 0
            model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    return len(received), most, lengths
