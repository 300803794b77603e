"""The cases of plan tests: tiny models, the batches of a short training, and every plan that the planner has."""

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
# The batch with this index is smaller: in the middle of an accumulation, as at the end of an epoch.
SMALLER_BATCH = 3
# No number of ranks divides the vocabulary.
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
CONSTRAINTS = {"deep-gpt2": Constraints(pipeline=8)}


def training_of(family):
    """The planner's description of the training."""
    return Training(architecture_from_config(MODELS[family], family), BATCH, LENGTH)


@functools.cache
def all_plans(family, workers=WORKERS):
    """Every plan that the planner enumerates for a number of devices, whatever their memory."""
    environment = make_environment(cluster_for_devices(find_device("MI250 GCD"), workers))
    constraints = CONSTRAINTS.get(family, Constraints())
    tables = candidate_tables(environment.roofline, environment.cluster, training_of(family), constraints)
    return tuple(table.plan(row) for table in tables for row in range(len(table)))


def covering_plans(families, workers):
    """A few plans, as (family, plan): any two traits that go together in some plan do so in one of these."""
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
    """The traits of a plan that a fault may depend on."""
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


def batch(index):
    """Rows of different lengths, padded on the right, one of them on the left.

    The labels of each row begin after a prompt of its own length. One row has none.
    """
    batch_size, length = batch_size_of(index), LENGTH - 3 if index == SMALLER_BATCH else LENGTH
    generator = torch.Generator().manual_seed(index)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    ids = draw(0, VOCABULARY, batch_size, length)
    lengths, prompt_lengths = draw(5, length + 1, batch_size, 1), draw(1, 4, batch_size, 1)
    positions = torch.arange(length)[None]
    positions = torch.where(torch.arange(batch_size)[:, None] == 1, positions - length + lengths, positions)
    mask = ((positions >= 0) & (positions < lengths)).long()
    labels = ids.masked_fill((mask == 0) | (positions < prompt_lengths), -100)
    labels[index % batch_size] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def can_be_packed(index):
    """True if nothing is masked before the labels of a batch. A packed row is longer than any other."""
    inputs = batch(index)
    has_label = inputs["labels"] != -100
    is_useful = has_label.flip(1).cumsum(1).flip(1) > 0
    # Of a row without labels the first token is left.
    is_useful[:, 0] = True
    return bool(inputs["attention_mask"][is_useful].all())


def batch_size_of(index):
    return BATCH - 1 if index == SMALLER_BATCH else BATCH


def evaluation_batch():
    """Fewer rows than ranks, of a length that the tensor-parallel ranks cannot divide."""
    return {name: tensor[:3] for name, tensor in batch(SMALLER_BATCH).items()}
