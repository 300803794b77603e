"""What plans are proved on: tiny models, the batches of a short training, and every plan that the planner has for them."""

import functools
from itertools import combinations

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moreh.accelerator.devices import find_device
from moreh.models.describe.from_config import architecture_from_config
from moreh.planner.hardware.cluster import cluster_for_devices
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.notation import parse_plan
from moreh.planner.plan.plan import Training
from moreh.planner.search.candidates import candidate_tables
from moreh.planner.search.constraints import Constraints

WORKERS = 8
BATCH, LENGTH = 8, 16
# The calls of the model in each step; with two of them, gradients are accumulated.
CALLS = (2, 2, 1, 1, 1)
STEPS = len(CALLS)
# In the middle of an accumulation, as at the end of an epoch.
SMALLER_BATCH = 3
# No number of ranks divides it.
VOCABULARY = 67

# Tied embeddings, query, key and value in one matrix, biases.
GPT2 = {
    "model_type": "gpt2",
    "n_layer": 5,
    "n_embd": 32,
    "n_head": 8,
    "n_positions": 24,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
MODELS = {
    "gpt2": GPT2,
    # Grouped-query attention, and layers for a pipeline of eight.
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 8,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 24,
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    },
    # For what pipelines of eight can do with more stages than ranks, and with stages that are not even.
    "deep-gpt2": GPT2 | {"n_layer": 17},
}
RESTRICTIONS = {"deep-gpt2": Constraints(pipeline=8)}


def training_of(family):
    """What the planner is told of the training."""
    return Training(architecture_from_config(MODELS[family], family), BATCH, LENGTH)


@functools.cache
def all_plans(family, workers=WORKERS):
    """Every plan that the planner enumerates for so many devices, whatever their memory."""
    setting = make_environment(cluster_for_devices(find_device("MI250 GCD"), workers))
    restrictions = RESTRICTIONS.get(family, Constraints())
    tables = candidate_tables(setting.roofline, setting.cluster, training_of(family), restrictions)
    return tuple(table.plan(row) for table in tables for row in range(len(table)))


def covering_plans(families, workers):
    """A few plans, as (family, plan), among which any two traits that go together in some plan do so in one of these."""
    cases = [(family, plan) for family in families for plan in all_plans(family, workers)]
    pairs = {case: set(combinations(_traits(*case).items(), 2)) for case in cases}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


def _traits(family, plan):
    """What a fault may depend on."""
    return {
        "family": family,
        "tensor": plan.tensor,
        "pipeline": plan.pipeline,
        "data": plan.data,
        "schedule": plan.schedule,
        "chunks": min(plan.chunks, 3),
        "recomputation": plan.recomputation,
        "sharding": plan.sharding,
        "sequence_parallel": plan.sequence_parallel,
        "one_micro_batch": plan.micro_batches == 1,
        "micro_batches_per_rank": np.sign(plan.micro_batches - plan.pipeline),
        "uneven": len(set(plan.stage_layers)) > 1,
    }


def plan_of(family, text, workers=WORKERS):
    """The plan that a text describes."""
    return parse_plan(text, training_of(family), workers)


def build_model(family):
    """A model in float64 in which no parameter is 0 or 1, the same in each process."""
    settings = {key: value for key, value in MODELS[family].items() if key != "model_type"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(MODELS[family]["model_type"], **settings)
    model = AutoModelForCausalLM.from_config(config).double()
    model.loss_type = "ForCausalLM"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def batch(number):
    """Rows of different lengths, padded on the right, one of them on the left; the labels of each row begin behind a prompt of
    its own length, and one row has none.
    """
    rows, length = rows_of_batch(number), LENGTH - 3 if number == SMALLER_BATCH else LENGTH
    generator = torch.Generator().manual_seed(number)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    ids, lengths, prompts = draw(0, VOCABULARY, rows, length), draw(5, length + 1, rows, 1), draw(1, 4, rows, 1)
    places = torch.arange(length)[None]
    places = torch.where(torch.arange(rows)[:, None] == 1, places - length + lengths, places)
    mask = ((places >= 0) & (places < lengths)).long()
    labels = ids.masked_fill((mask == 0) | (places < prompts), -100)
    labels[number % rows] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def can_be_packed(number):
    """Whether nothing is masked in front of the labels of a batch; a packed row is longer than any other."""
    given = batch(number)
    labelled = given["labels"] != -100
    behind = labelled.flip(1).cumsum(1).flip(1) > 0
    # Of a row without labels the first token is left.
    behind[:, 0] = True
    return bool(given["attention_mask"][behind].all())


def rows_of_batch(number):
    return BATCH - 1 if number == SMALLER_BATCH else BATCH


def evaluation_batch():
    """Fewer rows than ranks, of a length that the tensor-parallel ranks cannot divide."""
    return {name: tensor[:3] for name, tensor in batch(SMALLER_BATCH).items()}
