"""Checks whether a user's plan is possible for a training, and names the remedy."""

from collections.abc import Iterator
from math import gcd

from moreh.planner.plan.expert_groups import expert_divisor
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.schedules import SPLIT_BACKWARD


def plan_problems(plan: Plan, training: Training) -> Iterator[str]:
    """The fields that contradict the model, the sequences or another field, each with the remedy."""
    length = training.sequence_length
    heads = gcd(*(number for layer in training.architecture.layers for number in (layer.heads, layer.kv_heads)))
    tensor, context, ranks = plan.tensor, plan.context, plan.data * plan.context
    if heads % tensor:
        yield f"tp{tensor} does not divide the attention heads, whose common divisor is {heads}: give a divisor of it"
    if context > 1 and length % (2 * context):
        yield f"cp{context} needs sequences of a multiple of {2 * context} tokens, not of {length}: leave cp out"
    yield from _expert_problems(plan, training)
    if plan.sequence_parallel and tensor == 1:
        yield "sp splits sequences over tensor-parallel ranks, but the plan has tp1: leave it out, or give another tp"
    if plan.sequence_parallel and length % tensor:
        yield f"sp with tp{tensor} needs sequences of a multiple of {tensor} tokens, not of {length}: leave sp out"
    if plan.sharding != "none" and ranks == 1:
        yield (
            f"shard:{plan.sharding} shards over data-parallel ranks, but the plan has dp1: leave it out, or give "
            "another dp"
        )
    if plan.replicas > 1 and plan.sharding == "none":
        yield f"{plan.replicas} groups of ranks have nothing to shard: give shard:parameters:{plan.shard_ranks}"
    if plan.replicas > 1 and plan.expert > 1:
        yield f"shard:{plan.sharding}:{plan.shard_ranks} does not go with ep{plan.expert}: leave one of them out"
    if plan.sharding != "none" and plan.schedule in SPLIT_BACKWARD:
        yield (
            f"shard:{plan.sharding} does not go with {plan.schedule}, whose split backward pass leaves the gradients "
            "of sharded parameters wrong: use interleaved or 1f1b"
        )
    if plan.recomputation != "none" and plan.schedule in SPLIT_BACKWARD:
        yield (
            f"recompute:{plan.recomputation} does not go with {plan.schedule}, whose split backward pass would "
            "recompute again for the gradient of every matrix: use interleaved or 1f1b"
        )


def _expert_problems(plan: Plan, training: Training) -> Iterator[str]:
    """The reasons why data-parallel ranks cannot share the experts."""
    experts = expert_divisor(training.architecture)
    if plan.expert > 1 and experts == 1:
        yield f"ep{plan.expert} splits experts, but {training.architecture.name} has none: leave ep out"
    elif experts % plan.expert or plan.data % plan.expert:
        yield f"ep{plan.expert} does not divide dp{plan.data} and the {experts} experts: give a divisor of both"
