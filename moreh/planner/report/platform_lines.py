"""A plan in the format of the MoAI Platform's log."""

from moreh.planner.cost.prediction import Prediction
from moreh.planner.plan.plan import Plan
from moreh.planner.units import gib


def selected_config(plan: Plan) -> str:
    """A plan in the platform's words.

    >>> plan = Plan((10,) * 8, pipeline=8, data=8, micro_batches=64, recomputation="full", sharding="parameters")
    >>> selected_config(plan)
    'num_stages : 8, num_micro_batches : 64, batch_per_device : 1, No TP, recomputation : full(2), \
distribute_param : true, distribute_low_prec_param : false'
    """
    recomputation = {"none": "none(0)", "selective": "selective(1)", "full": "full(2)"}[plan.recomputation]
    return (
        f"num_stages : {plan.pipeline}, num_micro_batches : {plan.micro_batches}, "
        f"batch_per_device : {plan.micro_batch_size}, {f'TP {plan.tensor}' if plan.tensor > 1 else 'No TP'}, "
        f"recomputation : {recomputation}, "
        f"distribute_param : {str(plan.sharding == 'parameters').lower()}, distribute_low_prec_param : false"
    )


def detailed_line(rank: int, prediction: Prediction, word: str) -> str:
    """A line of the detailed log. Candidate 1 is the best. `word` names the kind of step time, such as simulated."""
    plan = prediction.plan
    parts = ", ".join(
        f"{name.removesuffix('_s')} {getattr(prediction.parts, name):.3f} s"
        for name in prediction.parts.__dataclass_fields__
        if name != "first_pass_s" or prediction.parts.first_pass_s
    )
    return (
        f"candidate {rank}: {selected_config(plan)}, schedule : {plan.schedule}({plan.chunks}), "
        f"sharding : {plan.sharding}, data_parallel : {plan.data}, stage_layers : {list(plan.stage_layers)}; "
        f"{word} step {prediction.step_time_s:.3f} s ({parts}), {gib(prediction.memory_bytes)}"
    )
