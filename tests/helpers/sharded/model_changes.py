"""A script's changes of a model: its own modules before the sharding, and the changes refused afterwards."""

import copy
import io

import torch

from moreh.planner.plan.plan import Plan
from moreh.runtime.engine.calls.checks import check_configuration, check_modules
from moreh.runtime.engine.sharded.install import install_sharding_support
from moreh.runtime.engine.sharded.registry import runner_of
from moreh.runtime.engine.sharded.shard_model import shard_model
from tests.helpers.batches import batch
from tests.helpers.compare import curve_difference
from tests.helpers.float64 import exact_float64
from tests.helpers.models.families import make_model
from tests.helpers.sharded.cases import error_of


class MeanOfRows(torch.nn.Module):
    """A module of the script's own that looks at whole rows, padding included."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states):
        return self.norm(hidden_states) + hidden_states.mean(1, keepdim=True)


def difference_with_own_module(plan):
    """On each rank: the largest difference of losses and gradients with a module that looks at whole rows."""
    install_sharding_support()
    whole = make_model("llama")
    whole.model.layers[1].post_attention_layernorm = MeanOfRows(whole.model.layers[1].post_attention_layernorm)
    sharded = copy.deepcopy(whole)
    ids, mask, labels = batch(0, whole.config.vocab_size)
    curves = []
    with exact_float64():
        shard_model(sharded, Plan(**plan))
        for model in (sharded, whole):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            curves.append([loss.item(), *(p.grad.norm().item() for p in model.parameters())])
    return curve_difference(*curves)


def with_fewer_layers(model):
    model.parts.causal.config.num_hidden_layers = 1
    return model


def errors_of_changes(plan):
    """The errors for scripts that copy a sharded model or change its modules."""
    install_sharding_support()
    ids, _, labels = batch(0, make_model("llama").config.vocab_size)

    def sharded(model=None):
        model = model or make_model("llama")
        shard_model(model, Plan(**plan))
        return model

    def add_parameter(model):
        model.model.scale = torch.nn.Parameter(torch.ones(1))

    def replace_module(model):
        model.lm_head = torch.nn.Linear(4, 4)

    def replace_forward(model):
        model.model.layers[0].forward = lambda hidden_states, **_: hidden_states

    def tie(model):
        model.lm_head.weight = model.model.embed_tokens.weight

    def see_later_tokens(model):
        model.config.is_causal = False

    def renormalize(model):
        model.get_input_embeddings().max_norm = 1.0

    errors = {}
    for change in (add_parameter, replace_module, replace_forward, tie, see_later_tokens):
        model = sharded()
        model(input_ids=ids, labels=labels).loss.backward()
        change(model)
        errors[change.__name__] = error_of(lambda model=model: model(input_ids=ids, labels=labels))
    model = make_model("llama")
    row, joined = model.lm_head.weight.data[1], torch.nn.Parameter(model.lm_head.weight.detach().flatten())
    sharded(model)
    weight = model.lm_head.weight
    loss = model(input_ids=ids, labels=labels).loss
    return errors | {
        "renormalize": error_of(lambda: renormalize(model) or check_modules(model)),
        "fewer layers": error_of(
            lambda: check_configuration(with_fewer_layers(runner_of(model).model), was_causal=True)
        ),
        "view": error_of(row.zero_),
        "flat parameter": error_of(lambda: torch.optim.SGD([joined], lr=0.1).zero_grad()),
        "copy": error_of(lambda: copy.deepcopy(model)),
        "average": error_of(lambda: torch.optim.swa_utils.AveragedModel(model)),
        "save": error_of(lambda: torch.save(model, io.BytesIO())),
        "memory": error_of(weight.untyped_storage),
        "shape": error_of(lambda: setattr(weight, "data", torch.ones(2, 2))),
        "second order": error_of(lambda: torch.autograd.grad(loss, [weight], create_graph=True)),
    }
