"""Why a plan is not the best one: where the seconds go in both, and what does not fit."""

from collections.abc import Sequence
from dataclasses import asdict

from moreh.planner.cost.prediction import DeviceMemory, Prediction
from moreh.planner.plan.notation import plan_fields, torch_refusal
from moreh.planner.plan.plan import Plan
from moreh.planner.report.report import Json, prediction_json
from moreh.planner.search.candidates import MAX_CHUNKS
from moreh.planner.search.request import Request
from moreh.planner.search.search import TIE_TOLERANCE
from moreh.planner.units import gib, percent_text, seconds_text

# The parts of a step in words, each with the pieces of a plan's text that it depends on most.
PARTS = {
    "computation_s": ("computation", ("mb", "tp", "cp", "pp", "layers")),
    "recomputation_s": ("recomputation", ("recompute",)),
    "tensor_exchange_s": ("tensor-parallel communication", ("tp", "sp", "recompute")),
    "data_exchange_s": ("sharding communication", ("shard", "dp", "cp", "mb")),
    "bubble_s": ("pipeline bubble", ("pp", "schedule", "mb", "layers")),
    "gradients_s": ("gradient reduction", ("shard", "dp", "cp")),
    "optimizer_s": ("optimizer", ("shard", "tp", "cp", "pp")),
}
# Pieces that a plan's text leaves out at their defaults.
DEFAULT_PIECES = {"cp": "cp1", "schedule": "1f1b", "recompute": "recompute:none", "shard": "shard:none", "sp": "no sp"}
# Differences below this share of the best plan's step are not worth a sentence, nor are more of them than this.
NOTABLE, MAX_DIFFERENCES = 0.01, 3


def explanation_rows(predictions: Sequence[Prediction]) -> list[tuple[str, ...]]:
    """The parts of a step and the memory of the fullest device, with a column for each plan."""
    fullest = [_fullest(prediction)[1] for prediction in predictions]
    step_s = max(prediction.step_time_s for prediction in predictions)
    rows = [
        (name, *(seconds_text(getattr(prediction.parts, part), step_s) for prediction in predictions))
        for part, (name, _) in PARTS.items()
    ]
    rows.append(("step time", *(seconds_text(prediction.step_time_s, step_s) for prediction in predictions)))
    rows.append(("tokens/s", *(f"{prediction.tokens_per_second:,.0f}" for prediction in predictions)))
    rows.append(("MFU", *(percent_text(prediction.mfu) for prediction in predictions)))
    for kind in DeviceMemory.__dataclass_fields__:
        rows.append((f"memory: {kind}", *(gib(getattr(rank, kind)) for rank in fullest)))
    return [*rows, ("memory: all", *(gib(rank.total) for rank in fullest))]


def explanation_sentences(request: Request, asked: Prediction, best: Prediction | None) -> list[str]:
    """Why a plan is not the best one: what does not fit, and where the seconds go."""
    fits = asked.memory_bytes <= request.limit_bytes
    sentences = [] if fits else [_missing_memory(request, asked)]
    if best is None:
        sentences.append(
            "It fits, but no plan that the search may choose does." if fits else "No other plan fits either."
        )
    elif asked.plan == best.plan:
        return ["This is the best plan of the search.", f"Its largest overhead: {asked.parts.largest_overhead}."]
    else:
        sentences += _slower(asked, best)
    refusal = torch_refusal(asked.plan)
    if refusal:
        sentences.append(f"Torch's schedule does not run it, the figures say what it would take: {refusal}.")
    reasons = _contradictions(asked.plan, request)
    if not reasons and not refusal and fits and best is not None and _faster(asked, best):
        reasons = ["its stages have other numbers of layers"]
    if reasons:
        sentences.append(f"The search did not consider it: {', and '.join(reasons)}.")
    return sentences


def _faster(asked: Prediction, best: Prediction) -> bool:
    return asked.step_time_s < best.step_time_s * (1 - TIE_TOLERANCE)


def _slower(asked: Prediction, best: Prediction) -> list[str]:
    """How much longer a step takes than with the best plan, and where."""
    more, step_s = asked.step_time_s - best.step_time_s, asked.step_time_s
    if abs(more) <= TIE_TOLERANCE * step_s:
        return [f"A step takes {seconds_text(step_s)}, as long as with the best plan: either will do."]
    share = f"{abs(more) / best.step_time_s:.1%}"
    sentences = [f"A step takes {seconds_text(step_s)}, {_more(more, step_s)} ({share}) than with the best plan."]
    gaps = part_differences(asked, best)
    notable = [part for part in gaps if abs(gaps[part]) > NOTABLE * best.step_time_s]
    for part in sorted(notable, key=lambda part: -abs(gaps[part]))[:MAX_DIFFERENCES]:
        name = PARTS[part][0].capitalize()
        sentences.append(f"{name} takes {_more(gaps[part], step_s)}{_instead(asked.plan, best.plan, part)}.")
    return sentences


def _more(seconds: float, step_s: float) -> str:
    return f"{seconds_text(abs(seconds), step_s)} {'more' if seconds > 0 else 'less'}"


def part_differences(asked: Prediction, best: Prediction) -> dict[str, float]:
    """Seconds that each part takes more in the first plan than in the second."""
    return {part: getattr(asked.parts, part) - getattr(best.parts, part) for part in PARTS}


def explanation_json(request: Request, asked: Prediction, best: Prediction | None) -> Json:
    """The explanation with both plans."""
    return {
        "asked": prediction_json(request, asked),
        "best": None if best is None else prediction_json(request, best),
        "differences": None if best is None else part_differences(asked, best),
        "missing_bytes": max(0.0, asked.memory_bytes - request.limit_bytes),
        "explanation": explanation_sentences(request, asked, best),
    }


def _fullest(prediction: Prediction) -> tuple[int, DeviceMemory]:
    return max(enumerate(prediction.memory), key=lambda entry: entry[1].total)


def _missing_memory(request: Request, asked: Prediction) -> str:
    rank, needed = _fullest(asked)
    kinds = sorted(asdict(needed).items(), key=lambda entry: -entry[1])[:2]
    largest = " and ".join(f"{gib(amount)} of {kind}" for kind, amount in kinds)
    missing = gib(needed.total - request.limit_bytes)
    beginning = f"{gib(needed.total)} on each device, {missing} more than plans may use, mostly for {largest}"
    if len(asked.memory) == 1:
        return f"It does not fit: it needs {beginning}."
    full = sum(entry.total > request.limit_bytes for entry in asked.memory)
    count = f"{full} of {len(asked.memory)} pipeline ranks need{'s' if full == 1 else ''} too much"
    return f"It does not fit: pipeline rank {rank} needs {beginning}; {count}."


def _instead(asked: Plan, best: Plan, part: str) -> str:
    """The settings behind a difference, of one plan and of the other."""
    mine, other = plan_fields(asked), plan_fields(best)
    names = [name for name in PARTS[part][1] if mine[name] != other[name]]
    if not names:
        return ""
    here, there = (
        " ".join(pieces[n] or DEFAULT_PIECES.get(n, "even layers") for n in names) for pieces in (mine, other)
    )
    return f", with {here} instead of {there}"


def _contradictions(plan: Plan, request: Request) -> list[str]:
    """Why a plan is not among the candidates."""
    given = request.constraints
    reasons = {
        f"cp{plan.context} is above the largest context size, {given.max_context}": plan.context > given.max_context,
        f"tp{plan.tensor} is above the largest tensor size, {given.max_tensor}": given.max_tensor is not None
        and plan.tensor > given.max_tensor,
        f"the number of stages is to be {given.pipeline}": given.pipeline not in (None, plan.pipeline),
        f"the number of micro-batches is to be {given.micro_batches}": given.micro_batches
        not in (None, plan.micro_batches),
        "recomputation is decided otherwise": given.recompute not in (None, plan.recomputation != "none"),
        "sharding of parameters is decided otherwise": given.shard_parameters
        not in (None, plan.sharding == "parameters"),
        f"{plan.schedule} is not among the schedules": plan.schedule not in given.schedules,
        f"more than {MAX_CHUNKS} chunks on a rank": plan.chunks > MAX_CHUNKS,
    }
    return [reason for reason, applies in reasons.items() if applies]
