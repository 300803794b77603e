"""The notation of plans: `tp4 pp8 dp2 mb1x64 interleaved:2 recompute:selective shard:optimizer sp`.

LEGEND describes the fields. `plan_text` writes a plan, `parse_plan` reads what users give to `moreh-plan --explain`.
"""

import re
from difflib import get_close_matches
from itertools import groupby

import numpy as np

from moreh.errors import PlanError
from moreh.planner.plan.layer_balancing import even_layers
from moreh.planner.plan.plan import RECOMPUTATIONS, SCHEDULES, SHARDINGS, Plan, Schedule, Training
from moreh.planner.plan.plan_problems import plan_problems
from moreh.planner.plan.schedules import is_runnable

# For the help of moreh-plan.
LEGEND = """\
A plan is written as these fields, in any order:
  tp4 pp8 dp2 cp2       tensor-, pipeline-, data- and context-parallel ranks
  ep2                   data-parallel ranks that share the experts of a mixture of experts
  mb1x64                64 micro-batches of 1 row per step
  interleaved:2         pipeline schedule and chunks per rank; also 1f1b, zero-bubble:N, zbv
  recompute:selective   activation recomputation; also none, full
  shard:optimizer       what data-parallel ranks shard; also none, gradients, parameters
  shard:parameters:8    the same in groups of 8 ranks (hybrid sharding, which is predicted but cannot be run)
  sp                    sequence parallelism
  layers:9,10x6,11      layers per stage: 9, then 10 in six stages, then 11
Defaults: parallel sizes are 1, dp uses all remaining devices, micro-batches have 1 row, the schedule is
1f1b, recompute and shard are none, and layers are divided evenly.
"""
# Chunks of a schedule that is given without a number.
DEFAULT_CHUNKS: dict[Schedule, int] = {"1f1b": 1, "interleaved": 2, "zero-bubble": 1, "zbv": 2}
_NUMBER = r"\d{1,7}"
_PATTERNS = {
    "tp": rf"tp({_NUMBER})",
    "pp": rf"pp({_NUMBER})",
    "dp": rf"dp({_NUMBER})",
    "cp": rf"cp({_NUMBER})",
    "ep": rf"ep({_NUMBER})",
    "mb": rf"mb({_NUMBER}(?:x{_NUMBER})?)",
    "schedule": rf"(1f1b|zbv|(?:interleaved|zero-bubble)(?::{_NUMBER})?)",
    "recompute": f"recompute:({'|'.join(RECOMPUTATIONS)})",
    "shard": f"shard:((?:{'|'.join(SHARDINGS)})(?::{_NUMBER})?)",
    "sp": "(sp)",
    "layers": rf"layers:({_NUMBER}(?:x{_NUMBER})?(?:,{_NUMBER}(?:x{_NUMBER})?)*)",
}
# What an unknown field is compared with, and the example that the error shows for the nearest one.
_EXAMPLES = {
    **{name: f"{name}4" for name in ("tp", "pp", "dp", "cp", "ep")},
    "mb": "mb1x64",
    "interleaved": "interleaved:2",
    **{name: name for name in ("1f1b", "zero-bubble", "zbv", "sp")},
    **{text: text for text in (f"recompute:{value}" for value in RECOMPUTATIONS)},
    **{text: text for text in (f"shard:{value}" for value in SHARDINGS)},
    "layers:": "layers:9,10x6,11",
}


def plan_text(plan: Plan) -> str:
    """The plan in one line. Fields with their default value are left out, except the sizes that every plan has."""
    return " ".join(text for text in plan_fields(plan).values() if text)


def plan_fields(plan: Plan) -> dict[str, str]:
    """The text of each field by the field's name; empty where a field has its default value and is left out."""
    chunks = "" if plan.schedule == "zbv" else f":{plan.chunks}"
    groups = f":{plan.shard_ranks}" if plan.replicas > 1 else ""
    even = even_layers(sum(plan.stage_layers), len(plan.stage_layers))
    return {
        "tp": f"tp{plan.tensor}",
        "pp": f"pp{plan.pipeline}",
        "dp": f"dp{plan.data}",
        "cp": f"cp{plan.context}" if plan.context > 1 else "",
        "ep": f"ep{plan.expert}" if plan.expert > 1 else "",
        "mb": f"mb{plan.micro_batch_size}x{plan.micro_batches}",
        "schedule": f"{plan.schedule}{chunks}" if plan.schedule != "1f1b" else "",
        "recompute": f"recompute:{plan.recomputation}" if plan.recomputation != "none" else "",
        "shard": f"shard:{plan.sharding}{groups}" if plan.sharding != "none" else "",
        "sp": "sp" if plan.sequence_parallel else "",
        "layers": f"layers:{_run_lengths(plan.stage_layers)}" if plan.stage_layers != even else "",
    }


def parse_plan(text: str, training: Training, devices: int) -> Plan:
    """The plan that a text describes.

    Accepts plans that torch alone refuses, as long as their order of operations is defined: `torch_refusal` tells.

    Args:
        training: The training that the plan is for.
        devices: The devices that the plan has to occupy.

    Raises:
        PlanError: an unknown field or one given twice; sizes whose product is not the number of devices; a batch that
            does not split into the micro-batches; a tensor-parallel size that does not divide the heads; layers that do
            not add up; a schedule whose order is not defined.
    """
    given = _parse_fields(text)
    tensor, pipeline, context, expert = (_size(given, name) for name in ("tp", "pp", "cp", "ep"))
    data = _data(given, tensor * pipeline * context, devices)
    micro_batch_size, micro_batches = _micro_batches(given, data, training.global_batch_size)
    schedule, chunks = _schedule(given, pipeline)
    sharding, _, group = given.get("shard", "none").partition(":")
    plan = Plan(
        stage_layers=_layers(given, len(training.architecture.layers), pipeline * chunks),
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        context=context,
        expert=expert,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        schedule=schedule,
        chunks=chunks,
        recomputation=next(value for value in RECOMPUTATIONS if value == given.get("recompute", "none")),
        sharding=next(value for value in SHARDINGS if value == sharding),
        replicas=_replicas(group, data * context),
        sequence_parallel="sp" in given,
    )
    _check(plan, training)
    return plan


def _run_lengths(numbers: tuple[int, ...]) -> str:
    """Runs of equal numbers with their lengths: (9, 10, 10, 11) is "9,10x2,11"."""
    runs = [(number, len(list(group))) for number, group in groupby(numbers)]
    return ",".join(f"{number}x{count}" if count > 1 else str(number) for number, count in runs)


def _parse_fields(text: str) -> dict[str, str]:
    """The value of each field that is given, by the field's name, without its prefix."""
    fields: dict[str, str] = {}
    for word in text.lower().split():
        matches = {name: re.fullmatch(pattern, word) for name, pattern in _PATTERNS.items()}
        name, match = next(((name, match) for name, match in matches.items() if match), ("", None))
        if match is None:
            raise _unknown_field(word)
        if name in fields:
            raise PlanError(f"plan: the field {name} is given twice, the second time as {word!r}: give one")
        fields[name] = match[1]
    if not fields:
        raise PlanError("the plan is empty: give fields such as 'tp4 pp8 dp2 mb1x64'")
    return fields


def _unknown_field(word: str) -> PlanError:
    letters = re.split(r"(?<=[a-z])\d", word)[0]
    near = get_close_matches(word, _EXAMPLES, n=1) or get_close_matches(letters, _EXAMPLES, n=1, cutoff=0.4)
    hint = f"did you mean one like {_EXAMPLES[near[0]]}?" if near else f"there are {', '.join(_EXAMPLES.values())}"
    return PlanError(f"plan: {word[:40]!r} is not a field of a plan: {hint}")


def _size(fields: dict[str, str], name: str) -> int:
    size = int(fields.get(name, "1"))
    if size < 1:
        raise PlanError(f"plan: {name}{size} is not possible: give at least {name}1")
    return size


def _data(fields: dict[str, str], others: int, devices: int) -> int:
    sizes = " ".join(f"{name}{fields[name]}" for name in ("tp", "pp", "cp") if name in fields) or "the plan"
    if "dp" not in fields:
        if devices % others:
            raise PlanError(
                f"plan: {sizes} does not divide {devices} devices: give sizes whose product divides {devices}"
            )
        return devices // others
    data = _size(fields, "dp")
    if data * others != devices:
        sizes = " ".join(f"{name}{fields[name]}" for name in ("tp", "pp", "dp", "cp") if name in fields)
        instead = (
            f"dp{devices // others}, or leave dp out" if devices % others == 0 else f"sizes with the product {devices}"
        )
        needed = f"{data * others} device{'s' if data * others > 1 else ''}"
        raise PlanError(f"plan: {sizes} is for {needed}, but there are {devices}: give {instead}")
    return data


def _replicas(group: str, ranks: int) -> int:
    if not group:
        return 1
    size = int(group)
    if size < 1 or ranks % size:
        raise PlanError(
            f"plan: groups of {group} ranks that shard together do not divide the {ranks} data- and context-parallel "
            f"ranks: give a divisor of {ranks}"
        )
    return ranks // size


def _micro_batches(fields: dict[str, str], data: int, batch: int) -> tuple[int, int]:
    if batch % data:
        raise PlanError(
            f"plan: dp{data} does not divide the batch of {batch} rows: give a dp that does, or another batch size"
        )
    rows = batch // data
    size_text, _, count_text = fields.get("mb", "1").partition("x")
    size = int(size_text)
    if size < 1 or rows % size:
        raise PlanError(
            f"plan: mb{size_text} does not divide the {rows} rows of each data-parallel rank: give a divisor of {rows}"
        )
    if count_text and size * int(count_text) != rows:
        made = data * size * int(count_text)
        instead = f"mb{size}x{rows // size}"
        raise PlanError(
            f"plan: dp{data} mb{fields['mb']} makes a batch of {made} rows, but it has {batch}: give {instead}"
        )
    return size, rows // size


def _schedule(fields: dict[str, str], pipeline: int) -> tuple[Schedule, int]:
    name, _, number = fields.get("schedule", "1f1b").partition(":")
    schedule = next(known for known in SCHEDULES if known == name)
    chunks = int(number) if number else DEFAULT_CHUNKS[schedule]
    if pipeline == 1 and schedule != "1f1b":
        raise PlanError(
            f"plan: {schedule} needs several stages, but the plan has pp1: leave it out, or give a pp above 1"
        )
    return schedule, chunks


def _layers(fields: dict[str, str], layers: int, stages: int) -> tuple[int, ...]:
    if not 1 <= stages <= layers:
        raise PlanError(
            f"plan: pp and chunks make {stages} stages, but the model has {layers} layers: give 1 to {layers} stages"
        )
    if "layers" not in fields:
        return even_layers(layers, stages)
    runs = [
        (int(number), int(count or 1))
        for number, _, count in (run.partition("x") for run in fields["layers"].split(","))
    ]
    run_stages, total = sum(count for _, count in runs), sum(number * count for number, count in runs)
    if run_stages != stages or total != layers or any(number < 1 for number, _ in runs):
        raise PlanError(
            f"plan: layers:{fields['layers']} gives {total} layers to {run_stages} stages, but there are {layers} "
            f"layers for {stages} stages, at least one each: leave it out, or give "
            f"{_run_lengths(even_layers(layers, stages))}"
        )
    return tuple(number for number, count in runs for _ in range(count))


def _check(plan: Plan, training: Training) -> None:
    """Raise PlanError for problems between fields: heads, sequence length, groups of one rank, and the schedule."""
    for problem in plan_problems(plan, training):
        raise PlanError(f"plan: {problem}")
    refusal = torch_refusal(plan)
    # With one chunk the order of operations is clear, so that it can be predicted all the same.
    if refusal and plan.chunks > 1:
        raise PlanError(f"plan: {refusal}: give {_nearest_micro_batches(plan)}")


def torch_refusal(plan: Plan) -> str:
    """The reason why torch does not run a plan's schedule, in terms of the plan's fields; empty if torch runs it."""
    pipeline, count = plan.pipeline, plan.micro_batches
    if _torch_runs(plan, count):
        return ""
    fields = f"pp{pipeline} mb{plan.micro_batch_size}x{count}"
    if plan.schedule == "1f1b":
        return f"1f1b needs at least as many micro-batches as stages, and {fields} has {count} for {pipeline}"
    return (
        f"{plan.schedule} with {fields} takes the micro-batches in {count // pipeline} equal rounds, into which "
        f"{count} micro-batches do not split"
    )


def _torch_runs(plan: Plan, micro_batches: int) -> bool:
    """True if torch runs the plan's pipeline with this number of micro-batches."""
    return bool(
        is_runnable(plan.schedule, np.asarray(plan.pipeline), np.asarray(micro_batches), np.asarray(plan.chunks))
    )


def _nearest_micro_batches(plan: Plan) -> str:
    """The `mb` field with the nearest number of micro-batches that torch runs."""
    rows = plan.micro_batch_size * plan.micro_batches
    counts = [count for count in range(1, rows + 1) if rows % count == 0 and _torch_runs(plan, count)]
    count = min(counts, key=lambda count: abs(count - plan.micro_batches))
    return f"mb{rows // count}x{count}"
