"""Explains why a plan is not the best one: step time by part, and memory that does not fit."""

from collections.abc import Sequence
from dataclasses import asdict

from moreh.planner.cost.prediction import DeviceMemory, Prediction
from moreh.planner.plan.notation import plan_fields, torch_refusal
from moreh.planner.plan.plan import Plan
from moreh.planner.report.json_output import Json, prediction_json
from moreh.planner.report.step_parts import STEP_PARTS
from moreh.planner.search.candidates import MAX_CHUNKS
from moreh.planner.search.request import Request
from moreh.planner.search.search import TIE_TOLERANCE
from moreh.planner.units import gib, percent_text, seconds_text
from moreh.tables import Column, Table

# The meaning of the fields that a plan's notation omits.
DEFAULT_FIELDS = {
    "cp": "cp1",
    "ep": "ep1",
    "schedule": "1f1b",
    "recompute": "recompute:none",
    "shard": "shard:none",
    "sp": "no sp",
    "layers": "even layers",
}
# A part of the step gets a sentence if it differs by more than this share of the best plan's step.
NOTABLE = 0.01
# The parts that get a sentence, the largest differences first.
MAX_DIFFERENCES = 3


def explanation_table_forms(asked: Prediction, best: Prediction | None) -> list[Table]:
    """Seconds of the step's parts and memory of the fullest device, with a column for each plan."""
    headers = ["This plan"] if best is None else ["This plan", "Best plan"]
    predictions = [asked] if best is None else [asked, best]
    columns = (Column("", 4, wraps=True), *(Column(header, 4, "right") for header in headers))
    full = Table(columns, tuple(_explanation_rows(predictions)))
    return [full, full.tightened().wrapped(2)]


def _explanation_rows(predictions: Sequence[Prediction]) -> list[tuple[str, ...]]:
    fullest = [_fullest(prediction)[1] for prediction in predictions]
    step_s = max(prediction.step_time_s for prediction in predictions)
    rows = [
        (part.name, *(seconds_text(getattr(prediction.parts, field), step_s) for prediction in predictions))
        for field, part in STEP_PARTS.items()
        # Only a mixture of experts has the first of these parts, and only a custom loss the second.
        if field not in ("expert_exchange_s", "first_pass_s")
        or any(getattr(prediction.parts, field) for prediction in predictions)
    ]
    rows.append(("step time", *(seconds_text(prediction.step_time_s, step_s) for prediction in predictions)))
    rows.append(("tokens/s", *(f"{prediction.tokens_per_second:,.0f}" for prediction in predictions)))
    rows.append(("MFU", *(percent_text(prediction.mfu) for prediction in predictions)))
    for kind in DeviceMemory.__dataclass_fields__:
        rows.append((f"memory: {kind}", *(gib(getattr(device, kind)) for device in fullest)))
    return [*rows, ("memory: all", *(gib(device.total) for device in fullest))]


def explanation_sentences(request: Request, asked: Prediction, best: Prediction | None) -> list[str]:
    """The reasons why a plan is not the best one: the memory that does not fit, the slow parts, the search's rules."""
    fits = asked.memory_bytes <= request.limit_bytes
    sentences = [] if fits else [_missing_memory(request, asked)]
    if best is None:
        sentences.append(
            "This plan fits, but none that the search may choose does." if fits else "No other plan fits either."
        )
    elif asked.plan == best.plan:
        return ["This is the best plan of the search.", f"Its largest overhead: {asked.parts.largest_overhead}."]
    else:
        sentences += _time_differences(asked, best)
    refusal = torch_refusal(asked.plan)
    if refusal:
        sentences.append(f"PyTorch cannot run its pipeline schedule: {refusal}. The figures assume that it could.")
    if asked.plan.replicas > 1:
        sentences.append("This package cannot run hybrid sharding. The figures are for programs that can.")
    reasons = _reasons_to_pass_over(asked.plan, request)
    if not reasons and not refusal and fits and best is not None and _is_faster(asked, best):
        reasons = ["its stages have other numbers of layers"]
    if reasons:
        sentences.append(f"The search did not consider it: {', and '.join(reasons)}.")
    return sentences


def part_differences(asked: Prediction, best: Prediction) -> dict[str, float]:
    """The seconds that each part of a step takes longer in the first plan than in the second, by field."""
    return {field: getattr(asked.parts, field) - getattr(best.parts, field) for field in STEP_PARTS}


def explanation_json(request: Request, asked: Prediction, best: Prediction | None) -> Json:
    """The explanation, with both plans."""
    return {
        "asked": prediction_json(request, asked),
        "best": None if best is None else prediction_json(request, best),
        "differences": None if best is None else part_differences(asked, best),
        "missing_bytes": max(0.0, asked.memory_bytes - request.limit_bytes),
        "explanation": explanation_sentences(request, asked, best),
    }


def _is_faster(asked: Prediction, best: Prediction) -> bool:
    return asked.step_time_s < best.step_time_s * (1 - TIE_TOLERANCE)


def _time_differences(asked: Prediction, best: Prediction) -> list[str]:
    """The difference of a step's time from the best plan's, in total and by part."""
    difference_s, step_s = asked.step_time_s - best.step_time_s, asked.step_time_s
    if abs(difference_s) <= TIE_TOLERANCE * step_s:
        return [f"A step takes {seconds_text(step_s)}, as long as with the best plan: either will do."]
    share = f"{abs(difference_s) / best.step_time_s:.1%}"
    sentences = [
        f"A step takes {seconds_text(step_s)}, {_more_or_less(difference_s, step_s)} ({share}) than with the best plan."
    ]
    differences = part_differences(asked, best)
    notable = [field for field in differences if abs(differences[field]) > NOTABLE * best.step_time_s]
    for field in sorted(notable, key=lambda field: -abs(differences[field]))[:MAX_DIFFERENCES]:
        name = STEP_PARTS[field].name.capitalize()
        cause = _cause(asked.plan, best.plan, field)
        sentences.append(f"{name} takes {_more_or_less(differences[field], step_s)}{cause}.")
    return sentences


def _more_or_less(seconds: float, step_s: float) -> str:
    return f"{seconds_text(abs(seconds), step_s)} {'more' if seconds > 0 else 'less'}"


def _cause(asked: Plan, best: Plan, field: str) -> str:
    """The fields of both plans that a part of the step depends on and in which they differ; empty where they do not."""
    asked_fields, best_fields = plan_fields(asked), plan_fields(best)
    names = [name for name in STEP_PARTS[field].plan_fields if asked_fields[name] != best_fields[name]]
    if not names:
        return ""
    asked_text, best_text = (
        " ".join(fields[name] or DEFAULT_FIELDS[name] for name in names) for fields in (asked_fields, best_fields)
    )
    return f", with {asked_text} instead of {best_text}"


def _fullest(prediction: Prediction) -> tuple[int, DeviceMemory]:
    """The pipeline rank that needs the most memory, and its memory."""
    return max(enumerate(prediction.memory), key=lambda entry: entry[1].total)


def _missing_memory(request: Request, asked: Prediction) -> str:
    rank, needed = _fullest(asked)
    kinds = sorted(asdict(needed).items(), key=lambda entry: -entry[1])[:2]
    largest = " and ".join(f"{gib(amount)} of {kind}" for kind, amount in kinds)
    missing = gib(needed.total - request.limit_bytes)
    amounts = f"{gib(needed.total)} on each device, {missing} more than plans may use, mostly for {largest}"
    if len(asked.memory) == 1:
        return f"It does not fit: it needs {amounts}."
    full = sum(device.total > request.limit_bytes for device in asked.memory)
    count = f"{full} of {len(asked.memory)} pipeline ranks need{'s' if full == 1 else ''} too much"
    return f"It does not fit: pipeline rank {rank} needs {amounts}; {count}."


def _reasons_to_pass_over(plan: Plan, request: Request) -> list[str]:
    """The reason why a plan is not among the candidates, in terms of moreh-plan's options."""
    constraints = request.constraints
    recompute, sharding = f"recompute:{plan.recomputation}", f"shard:{plan.sharding}"
    reasons = {
        f"cp{plan.context} is above --max-context {constraints.max_context}": plan.context > constraints.max_context,
        f"ep{plan.expert} is above --max-expert {constraints.max_expert}": plan.expert > constraints.max_expert,
        f"tp{plan.tensor} is above --max-tensor {constraints.max_tensor}": constraints.max_tensor is not None
        and plan.tensor > constraints.max_tensor,
        f"pp{plan.pipeline} contradicts --stages {constraints.pipeline}": constraints.pipeline
        not in (None, plan.pipeline),
        f"its {plan.micro_batches} micro-batches contradict --micro-batches {constraints.micro_batches}": (
            constraints.micro_batches not in (None, plan.micro_batches)
        ),
        f"{recompute} contradicts --recompute {_yes_no(constraints.recompute)}": constraints.recompute
        not in (None, plan.recomputation != "none"),
        f"{sharding} contradicts --shard-parameters {_yes_no(constraints.shard_parameters)}": (
            constraints.shard_parameters not in (None, plan.sharding == "parameters")
        ),
        f"{plan.schedule} is not among the --schedules": plan.schedule not in constraints.schedules,
        f"it has {plan.chunks} chunks on each rank, and the search tries at most {MAX_CHUNKS}": plan.chunks
        > MAX_CHUNKS,
    }
    return [reason for reason, applies in reasons.items() if applies]


def _yes_no(choice: bool | None) -> str:
    return "yes" if choice else "no"
