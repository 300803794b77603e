"""What is said about plans: rows of tables, lines of text, and content for JSON. Nothing here is printed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from moreh.accelerator.devices import Device
from moreh.accelerator.flavors import Flavor
from moreh.planner.candidates import MAX_CHUNKS, Restrictions
from moreh.planner.efficiency import uncertainty
from moreh.planner.plan import Plan, Training
from moreh.planner.plan_text import plan_pieces, plan_text
from moreh.planner.prediction import DeviceMemory, Prediction, Setting
from moreh.planner.search import EQUAL, SearchResult

GIB = 2**30
Json = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What is to be planned. `flavor` is the accelerator of the setting, if it is one; `precision` is that of arithmetic."""

    training: Training
    setting: Setting
    restrictions: Restrictions
    flavor: Flavor | None = None
    precision: str = "bfloat16"

    @property
    def accelerator(self) -> str:
        """Where it is to run, for people."""
        devices = f"{self.setting.cluster.devices} x {self.device.name}"
        return devices if self.flavor is None else f"{self.flavor.name} ({devices})"

    @property
    def device(self) -> Device:
        """The kind of devices."""
        return self.setting.cluster.device

    @property
    def limit_bytes(self) -> float:
        """What a plan may use of each device."""
        return self.device.memory_bytes * self.restrictions.memory_fraction


def uncertainty_text(device: Device) -> str:
    """One line on how far the figures for a kind of device can be trusted."""
    error, runs = uncertainty(device.efficiency)
    within = f"within {ceil(100 * error)}% for 4 of 5 published runs"
    if runs == 0:
        within = f"{within} on other devices; there is none on the class of these ({device.efficiency})"
    else:
        within = f"{within} on this class of devices ({device.efficiency}, {runs} run{'s' if runs > 1 else ''})"
    return f"All figures are predictions, not measurements. Step times came out {within}."


def header_rows(request: Request, result: SearchResult | None = None) -> list[tuple[str, str]]:
    """What was planned, as pairs of a word and a text."""
    architecture, training, cluster = request.training.architecture, request.training, request.setting.cluster
    device_memory = f"{gib(request.device.memory_bytes)} on each device"
    percent = f"{100 * request.restrictions.memory_fraction:g}%"
    rows = [
        ("Model", f"{architecture.name}, {architecture.parameters:,} parameters"),
        ("Accelerator", f"{request.accelerator} on {cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"),
        ("Memory", f"{device_memory}, of which plans may use {percent}, {gib(request.limit_bytes)}"),
        ("Step", f"{training.global_batch_size:,} x {training.sequence_length:,} tokens, {request.precision}"),
    ]
    restricted = restrictions_text(request.restrictions)
    if restricted:
        rows.append(("Restrictions", restricted))
    if result is not None:
        seconds = result.memory_s + result.search_s
        rows.append(("Search", f"{result.candidates:,} candidates, {result.possible:,} fit in memory, {seconds:.2f} s"))
    return [*rows, ("Note", uncertainty_text(request.device))]


def restrictions_text(restrictions: Restrictions) -> str:
    """What the user has decided already, without what is so by default; may be empty."""
    texts = []
    if restrictions.pipeline is not None:
        texts.append(f"stages {restrictions.pipeline}")
    if restrictions.micro_batches is not None:
        texts.append(f"micro-batches {restrictions.micro_batches}")
    for name, choice in (("recomputation", restrictions.recompute), ("sharded parameters", restrictions.shard_parameters)):
        if choice is not None:
            texts.append(name if choice else f"no {name}")
    if restrictions.max_tensor is not None:
        texts.append(f"tensor at most {restrictions.max_tensor}")
    if restrictions.max_context != 1:
        texts.append(f"context at most {restrictions.max_context}")
    return ", ".join(texts)


PLAN_HEADERS = ("Rank", "Plan", "Memory per device", "Step time", "Tokens/s", "MFU", "Limited by")


def plan_rows(request: Request, result: SearchResult) -> list[tuple[str, ...]]:
    """A row of PLAN_HEADERS for each of the best plans."""
    return [
        (
            str(rank),
            plan_text(best.plan),
            memory_text(request, best),
            seconds_text(best.step_time_s),
            f"{best.tokens_per_second:,.0f}",
            percent_text(best.mfu),
            best.parts.limit,
        )
        for rank, best in enumerate(result.best, start=1)
    ]


def memory_text(request: Request, prediction: Prediction) -> str:
    """Memory of the fullest device, and how much of the device that is."""
    share = prediction.memory_bytes / request.device.memory_bytes
    return f"{gib(prediction.memory_bytes)} ({share:.0%})"


def gib(amount: float) -> str:
    """Bytes in GiB, with more digits where there is little."""
    value = amount / GIB
    return f"{value:,.1f} GiB" if value >= 10 else f"{value:.2f} GiB"


def seconds_text(seconds: float, step_s: float | None = None) -> str:
    """Seconds with two decimals, or milliseconds where the step is so short that this would be too coarse."""
    return f"{seconds:,.2f} s" if (seconds if step_s is None else step_s) >= 1 else f"{seconds * 1000:,.2f} ms"


def percent_text(fraction: float) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.1f}%"


def request_json(request: Request) -> Json:
    """What was planned."""
    training, cluster, device = request.training, request.setting.cluster, request.device
    return {
        "model": {
            "name": training.architecture.name,
            "family": training.architecture.family,
            "parameters": training.architecture.parameters,
            "trainable_parameters": training.architecture.trainable_parameters,
            "layers": len(training.architecture.layers),
            "max_positions": training.architecture.max_positions,
        },
        "accelerator": {
            "name": None if request.flavor is None else request.flavor.name,
            "device": device.name,
            "devices": cluster.devices,
            "nodes": cluster.nodes,
            "device_memory_bytes": device.memory_bytes,
        },
        "batch_size": training.global_batch_size,
        "sequence_length": training.sequence_length,
        "precision": request.precision,
        "restrictions": asdict(request.restrictions),
        "limit_bytes": request.limit_bytes,
        "uncertainty": uncertainty_text(device),
    }


def search_json(request: Request, result: SearchResult) -> Json:
    """The counts of a search and its plans."""
    return {
        "search": {
            "candidates": result.candidates,
            "possible": result.possible,
            "smallest_bytes": result.smallest_bytes,
            "memory_s": result.memory_s,
            "search_s": result.search_s,
        },
        "plans": [{"rank": rank, **prediction_json(request, best)} for rank, best in enumerate(result.best, start=1)],
    }


def prediction_json(request: Request, prediction: Prediction) -> Json:
    """A plan with everything that is predicted of it."""
    return {
        "text": plan_text(prediction.plan),
        "plan": asdict(prediction.plan),
        "step_time_s": prediction.step_time_s,
        "tokens_per_second": prediction.tokens_per_second,
        "mfu": prediction.mfu,
        "limit": prediction.parts.limit,
        "parts": asdict(prediction.parts),
        "memory_bytes": prediction.memory_bytes,
        "memory_fraction": prediction.memory_bytes / request.device.memory_bytes,
        "fits": prediction.memory_bytes <= request.limit_bytes,
        "memory_by_rank": [{**asdict(rank), "total": rank.total} for rank in prediction.memory],
        "stage_forward_s": list(prediction.stage_forward_s),
        "stage_backward_s": list(prediction.stage_backward_s),
        "weight_fraction": prediction.weight_fraction,
        "send_s": prediction.send_s,
    }


# The parts of a step in words, each with the pieces of a plan's text that it depends on most.
PARTS = {
    "computation_s": ("computation", ("mb", "tp", "pp", "layers")),
    "recomputation_s": ("recomputation", ("recompute",)),
    "tensor_exchange_s": ("tensor-parallel exchange", ("tp", "sp", "recompute")),
    "data_exchange_s": ("exchange of shards", ("shard", "dp", "mb")),
    "bubble_s": ("pipeline bubble", ("pp", "schedule", "mb", "layers")),
    "gradients_s": ("gradient exchange", ("shard", "dp")),
    "optimizer_s": ("optimizer", ("shard", "tp", "pp")),
}
# Pieces that a plan's text leaves out at their defaults.
DEFAULT_PIECES = {"cp": "cp1", "schedule": "1f1b", "recompute": "recompute:none", "shard": "shard:none", "sp": "no sp"}
# Differences below this share of the best plan's step are not worth a sentence, nor are more of them than this.
NOTABLE, MOST_DIFFERENCES = 0.01, 3


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
        return [*sentences, "It fits, but no plan that the search may choose does." if fits else "No other plan fits either."]
    if asked.plan == best.plan:
        return ["This is the best plan of the search.", f"What limits it: {asked.parts.limit}."]
    more, step_s = asked.step_time_s - best.step_time_s, asked.step_time_s
    if abs(more) <= EQUAL * step_s:
        return [*sentences, f"A step takes {seconds_text(step_s)}, as long as with the best plan: either will do."]
    share = f"{abs(more) / best.step_time_s:.1%}"
    sentences.append(f"A step takes {seconds_text(step_s)}, {_more(more, step_s)} ({share}) than with the best plan.")
    gaps = part_differences(asked, best)
    notable = [part for part in gaps if abs(gaps[part]) > NOTABLE * best.step_time_s]
    for part in sorted(notable, key=lambda part: -abs(gaps[part]))[:MOST_DIFFERENCES]:
        name = PARTS[part][0].capitalize()
        sentences.append(f"{name} takes {_more(gaps[part], step_s)}{_instead(asked.plan, best.plan, part)}.")
    if more < 0 and fits:
        sentences.append(f"The search did not consider it: {_outside(asked.plan, request)}.")
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
    full = sum(entry.total > request.limit_bytes for entry in asked.memory)
    return (
        f"It does not fit: pipeline rank {rank} needs {gib(needed.total)} on each device, {missing} more than plans may use, "
        f"mostly for {largest}; {full} of {len(asked.memory)} pipeline ranks need too much."
    )


def _instead(asked: Plan, best: Plan, part: str) -> str:
    """The settings behind a difference, of one plan and of the other."""
    mine, other = plan_pieces(asked), plan_pieces(best)
    names = [name for name in PARTS[part][1] if mine[name] != other[name]]
    if not names:
        return ""
    here, there = (" ".join(pieces[n] or DEFAULT_PIECES.get(n, "even layers") for n in names) for pieces in (mine, other))
    return f", with {here} instead of {there}"


def _outside(plan: Plan, request: Request) -> str:
    """Why a plan is not among the candidates."""
    given = request.restrictions
    reasons = {
        f"cp{plan.context} is above the largest context size, {given.max_context}": plan.context > given.max_context,
        f"tp{plan.tensor} is above the largest tensor size": given.max_tensor is not None and plan.tensor > given.max_tensor,
        "the number of stages is another one": given.pipeline not in (None, plan.pipeline),
        "the number of micro-batches is another one": given.micro_batches not in (None, plan.micro_batches),
        "recomputation is decided otherwise": given.recompute not in (None, plan.recomputation != "none"),
        "sharding of parameters is decided otherwise": given.shard_parameters not in (None, plan.sharding == "parameters"),
        f"more than {MAX_CHUNKS} chunks on a rank": plan.chunks > MAX_CHUNKS,
    }
    return next((reason for reason, applies in reasons.items() if applies), "its stages have other numbers of layers")
