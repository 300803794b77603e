"""The JSON output of requests, searches and predictions."""

from dataclasses import asdict
from typing import Any

from moreh.planner.cost.memory.driver_memory import driver_memory
from moreh.planner.cost.prediction import Prediction
from moreh.planner.plan.notation import plan_text
from moreh.planner.report.plan_rows import uncertainty_text
from moreh.planner.search.request import Request
from moreh.planner.search.search import SearchOutcome, SearchResult

Json = dict[str, Any]


def request_json(request: Request) -> Json:
    """The planned training."""
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
        "optimizer": asdict(training.optimizer),
        "precision": request.precision,
        "restrictions": asdict(request.constraints),
        "limit_bytes": request.limit_bytes,
        "uncertainty": uncertainty_text(device),
    }


def search_json(request: Request, result: SearchResult) -> Json:
    """The counts of a search and the plans that it found, the best first."""
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
    """The devices in use, why others are idle, and why no plan fits; None where there is nothing to say."""
    return {"devices_in_use": outcome.environment.cluster.devices, "idle": outcome.idle or None, "message": message}


def prediction_json(request: Request, prediction: Prediction) -> Json:
    """A plan with all that is predicted of it."""
    return {
        "text": plan_text(prediction.plan),
        "plan": asdict(prediction.plan),
        "step_time_s": prediction.step_time_s,
        "tokens_per_second": prediction.tokens_per_second,
        "mfu": prediction.mfu,
        "limit": prediction.parts.largest_overhead,
        "parts": asdict(prediction.parts),
        "memory_bytes": prediction.memory_bytes,
        "memory_by_tool": asdict(driver_memory(prediction.plan, prediction.memory_bytes)),
        "memory_fraction": prediction.memory_bytes / request.device.memory_bytes,
        "fits": prediction.memory_bytes <= request.limit_bytes,
        "memory_by_rank": [{**asdict(rank), "total": rank.total} for rank in prediction.memory],
        "stage_forward_s": list(prediction.stage_forward_s),
        "stage_backward_s": list(prediction.stage_backward_s),
        "weight_fraction": prediction.weight_fraction,
        "send_s": prediction.send_s,
    }
