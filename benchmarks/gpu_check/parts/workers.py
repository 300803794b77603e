"""Two workers on one GPU: their losses are those of one worker, under tensor, pipeline and data parallelism.

NCCL refuses two workers on one GPU. With MOREH_SHARE_GPUS=1 they talk over gloo, through the memory of the CPU.
"""

import importlib
import json
from dataclasses import replace
from typing import Any

import torch

from gpu_check.parts.correctness import enable_line
from gpu_check.parts.families import VOCABULARY, make_model
from gpu_check.rows import make_batch
from gpu_check.settings import Result, Settings

STEPS = 3
TOLERANCE = 1e-5
# Plans that are looked through for one with the traits of a case.
MANY = 10_000
# By the name of a case, the traits of the plan that it forces.
PLANS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2, "pipeline": 1, "data": 1},
    "pp2": {"tensor": 1, "pipeline": 2, "data": 1},
    "dp2": {"tensor": 1, "pipeline": 1, "data": 2, "sharding": "none"},
    "dp2 sharded": {"tensor": 1, "pipeline": 1, "data": 2, "sharding": "parameters"},
}
ONE_WORKER = "one worker"


def run(case: str, settings: Settings) -> Result:
    """Train a few steps as a case says, and compare the losses with those of one worker, which comes first."""
    enable_line("float32", settings)  # starts this program again in each worker
    from moreh.planner.plan.notation import plan_text
    from moreh.runtime.engine.sharded.registry import runner_of

    if case != ONE_WORKER:
        _force(PLANS[case])
    model = make_model("llama", settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        batch = make_batch(step, VOCABULARY, settings.rows, settings.length, settings.length // 3)
        loss = model(**batch.to(settings.device), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    expected_file = settings.scratch / "one-worker.json"
    if case == ONE_WORKER:
        expected_file.write_text(json.dumps(losses))
        return Result(True, {"last loss": losses[-1]})
    expected = json.loads(expected_file.read_text())
    error = max(abs(loss - other) / abs(other) for loss, other in zip(losses, expected, strict=True))
    runner = runner_of(model)
    if runner is None or not _has(runner.plan, PLANS[case]):
        return Result(False, {}, f"the workers carried out {'no plan' if runner is None else plan_text(runner.plan)}")
    figures = {"plan": plan_text(runner.plan), "last loss": losses[-1], "loss error": error}
    passed = error <= TOLERANCE and all(loss == loss for loss in losses)
    return Result(passed, figures, "" if passed else "the losses differ")


def _force(traits: dict[str, Any]) -> None:
    """Let the planner choose the fastest plan with some traits, of those for two workers and of the accelerator's."""
    choose_plan: Any = importlib.import_module("moreh.runtime.engine.choose_plan")
    search, search_on_most_devices = choose_plan.search, choose_plan.search_on_most_devices

    def with_traits(result: Any, count: int) -> Any:
        fitting = [prediction for prediction in result.best if _has(prediction.plan, traits)]
        return replace(result, best=tuple((fitting or result.best)[:count]))

    def forced_search(request: Any, environment: Any, constraints: Any, count: int = 10, **others: Any) -> Any:
        return with_traits(search(request, environment, constraints, count=MANY, **others), count)

    def forced_on_most_devices(request: Any, environment: Any, constraints: Any, count: int = 10, **others: Any) -> Any:
        outcome = search_on_most_devices(request, environment, constraints, count=MANY, **others)
        return replace(outcome, result=with_traits(outcome.result, count))

    choose_plan.search, choose_plan.search_on_most_devices = forced_search, forced_on_most_devices


def _has(plan: Any, traits: dict[str, Any]) -> bool:
    return all(getattr(plan, trait) == value for trait, value in traits.items())
