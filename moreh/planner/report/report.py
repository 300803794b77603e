"""What is said about plans: rows of tables, lines of text, and content for JSON. Nothing here is printed."""

from dataclasses import asdict
from typing import Any

from moreh.accelerator.devices import Device
from moreh.planner.cost.prediction import Prediction
from moreh.planner.hardware.efficiency import uncertainty
from moreh.planner.hardware.measured_device import THIS_MACHINE
from moreh.planner.plan.notation import plan_text
from moreh.planner.search.constraints import constraints_text
from moreh.planner.search.request import Request
from moreh.planner.search.search import SearchOutcome, SearchResult
from moreh.planner.units import gib, percent_text, seconds_text

Json = dict[str, Any]


def uncertainty_text(device: Device) -> str:
    """One line on how far the figures for a kind of device can be trusted."""
    if device.efficiency == THIS_MACHINE:
        return "All figures are predictions, from rates that were measured on this machine."
    known = uncertainty(device.efficiency)
    return f"All figures are predictions, not measurements. Step times came out {known.text}."


def header_rows(request: Request, result: SearchResult | None = None) -> list[tuple[str, str]]:
    """What was planned, as pairs of a word and a text."""
    architecture, training, cluster = request.training.architecture, request.training, request.environment.cluster
    device_memory = f"{gib(request.device.memory_bytes)} on each device"
    percent = f"{100 * request.constraints.memory_fraction:g}%"
    rows = [
        ("Model", f"{architecture.name}, {architecture.parameters:,} parameters"),
        ("Accelerator", f"{request.accelerator} on {cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"),
        ("Memory", f"{device_memory}, of which plans may use {percent}, {gib(request.limit_bytes)}"),
        ("Step", f"{training.global_batch_size:,} x {training.sequence_length:,} tokens, {request.precision}"),
    ]
    restricted = constraints_text(request.constraints)
    if restricted:
        rows.append(("Constraints", restricted))
    if result is not None:
        seconds = result.memory_s + result.search_s
        rows.append(("Search", f"{result.candidates:,} candidates, {result.possible:,} fit in memory, {seconds:.2f} s"))
    return [*rows, ("Note", uncertainty_text(request.device))]


PLAN_HEADERS = ("#", "Plan", "Memory per device", "Step time", "Tokens/s", "MFU", "Largest overhead")


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
            best.parts.largest_overhead,
        )
        for rank, best in enumerate(result.best, start=1)
    ]


def memory_text(request: Request, prediction: Prediction) -> str:
    """Memory of the fullest device, and how much of the device that is."""
    share = prediction.memory_bytes / request.device.memory_bytes
    return f"{gib(prediction.memory_bytes)} ({share:.0%})"


def request_json(request: Request) -> Json:
    """What was planned."""
    training, cluster, device = request.training, request.environment.cluster, request.device
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
        "restrictions": asdict(request.constraints),
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


def search_outcome_json(outcome: SearchOutcome, message: str | None) -> Json:
    """The devices in use, and what there is to say about idle ones and about plans that do not fit."""
    return {"devices_in_use": outcome.environment.cluster.devices, "idle": outcome.idle or None, "message": message}


def prediction_json(request: Request, prediction: Prediction) -> Json:
    """A plan with everything that is predicted of it."""
    return {
        "text": plan_text(prediction.plan),
        "plan": asdict(prediction.plan),
        "step_time_s": prediction.step_time_s,
        "tokens_per_second": prediction.tokens_per_second,
        "mfu": prediction.mfu,
        "limit": prediction.parts.largest_overhead,
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
