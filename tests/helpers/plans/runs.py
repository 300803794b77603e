"""One plan on all workers, and how far its training is from that of a single process."""

import re
import time
from dataclasses import dataclass

import numpy as np

from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.plan import Plan
from moreh.runtime.batch.packing import LENGTH_MULTIPLE
from moreh.runtime.batch.shape_buckets import bucket_size
from moreh.runtime.engine.parallel_model import local_tensor
from moreh.runtime.engine.sharded import registry, shard_model
from moreh.runtime.engine.sharded.install import install_sharding_support
from moreh.runtime.sharding.spec import shard_boxes
from tests.helpers.compare import curve_difference, relative_difference, worst
from tests.helpers.plans.cases import CALLS, LENGTH, STEPS, batch_size_of, can_be_packed
from tests.helpers.plans.faults import FAULTS
from tests.helpers.plans.training import LOSSES, Curves, base_model, new_model, reference, train
from tests.helpers.workers import run_on_workers

TOLERANCE = 1e-9
# Until a plan that does not end is given up, and until the processes have been started, on a machine that is busy.
TIMEOUT_S, START_TIMEOUT_S = 300, 600


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter."""

    boxes: list
    """The boxes of the whole tensor that the rank holds, `[box, dimension, 2]`."""
    dim: int
    """The dimension that the boxes are concatenated along."""
    gradient: np.ndarray | None
    """The first step's gradient of the boxes."""
    weight: np.ndarray
    """The weights of the boxes in the end."""
    steps: float
    """AdamW's count of steps."""


@dataclass(frozen=True)
class RankResult:
    """The results of a rank."""

    curves: Curves
    shards: dict[str, Shard]
    """By parameter."""
    layer_inputs: list[tuple[int, int]]
    """The shapes `[rows, tokens]` that one of the rank's layers was called with in training, recomputation included."""
    cpu_s: float
    """CPU time of the process, in seconds."""


def get_ready(family):
    """On each rank, once for all plans: what takes seconds."""
    install_sharding_support()
    base_model(family)


def train_with_plan(family: str, plan: Plan, fault: str | None, steps: int, loss: str) -> RankResult:
    """On each rank: the script's training on a model that is sharded as the plan says."""
    started = time.process_time()
    models, layer_inputs = [], []

    def shard_with_plan(root):
        models.append(shard_model.shard_model(root, plan).model)
        layer = models[0].stages[0].layers[0]
        # transformers repeats what is inside of a layer, without the layer's hooks.
        norm = next(part for part in layer.children() if all(parameter.dim() == 1 for parameter in part.parameters()))
        norm.register_forward_pre_hook(
            lambda norm, args: layer_inputs.append(tuple(args[0].shape[:2])) if norm.training else None
        )

    try:
        with FAULTS[fault]():
            training = train(new_model(family), shard_with_plan, steps, LOSSES[loss])
        (model,) = models
        mesh = model.mesh
        ranks = mesh.rank("tensor"), plan.tensor, mesh.rank("data"), plan.data
        shards = {}
        for name in model.compute_params:
            parameter = model.user_params[name]
            spec, gradient = model.specs[name], training.gradients[name]
            state = training.optimizer.state.get(parameter, {})
            shards[name] = Shard(
                boxes=shard_boxes(spec, *ranks),
                dim=0 if spec.tp_split is None else spec.tp_split.dim,
                gradient=None if gradient is None else local_tensor(gradient).numpy(),
                weight=local_tensor(parameter.detach()).numpy(),
                steps=float(state.get("step", 0)),
            )
        return RankResult(training.curves, shards, layer_inputs, time.process_time() - started)
    finally:
        # Hundreds of models go through a process; no script shards more than a few.
        registry._runners.clear()


@dataclass(frozen=True)
class Differences:
    """The worst relative differences: of numbers to themselves, of elements to the largest of their tensor."""

    losses: float
    norms: float
    evaluation: float
    logits: float
    gradients: float
    weights: float
    replicas: float
    """Between ranks that hold the same elements."""

    @property
    def worst(self) -> float:
        return worst(vars(self).values())


@dataclass(frozen=True)
class Verdict:
    """The result of a plan."""

    family: str
    plan: Plan
    differences: Differences | None
    """None if the plan failed or did not end."""
    problems: tuple[str, ...]
    """All that is wrong; empty if nothing is."""
    seconds: float = 0.0
    """Wall-clock time."""
    cpu_s: float = 0.0
    """CPU time of all processes together, in seconds."""

    @property
    def text(self) -> str:
        return f"{self.family}: {plan_text(self.plan)}"


def verify(family, plan, fault=None, steps=STEPS, timeout=TIMEOUT_S, loss="built-in"):
    """Run a plan and compare it. A plan that fails or hangs gives a verdict too."""
    run_on_workers(get_ready, [(family,)], size=plan.devices, timeout=START_TIMEOUT_S)
    started = time.perf_counter()
    try:
        case = (family, plan, fault, steps, loss)
        (ranks,) = run_on_workers(train_with_plan, [case], size=plan.devices, timeout=timeout)
    except AssertionError as error:
        return Verdict(family, plan, None, (str(error),), time.perf_counter() - started)
    seconds = time.perf_counter() - started
    expected = reference(family, steps, loss)
    differences, problems = compare(ranks, expected, steps)
    problems += not_held_as_planned(ranks, expected.weights, plan)
    # A loss of the script's own takes a second forward pass.
    if loss == "built-in":
        problems += not_called_as_planned(ranks, plan, steps)
    return Verdict(family, plan, differences, tuple(problems), seconds, sum(rank.cpu_s for rank in ranks))


def not_held_as_planned(ranks, weights, plan):
    """The parts that ranks hold otherwise than the plan says: an unsharded model would give the right results, too."""
    problems = []
    copies = plan.data if plan.sharding == "none" else 1
    for name, weight in weights.items():
        held = sum(result.shards[name].weight.size for result in ranks if name in result.shards)
        # Each matrix of a layer is in one stage, and split by tensor and data parallelism.
        if re.search(r"\.\d+\.", name) and weight.ndim == 2 and held != copies * weight.size:
            problems.append(f"{name} is held {held / weight.size:g} times, but the plan means {copies}")
    return problems


def not_called_as_planned(ranks, plan, steps):
    """The computations of ranks that differ from the plan."""
    problems = []
    batches = range(sum(CALLS[:steps]))
    repeats = 1 if plan.recomputation == "none" else 2
    unpacked_rows = repeats * sum(
        -(-batch_size_of(index) // plan.data) for index in batches if not can_be_packed(index)
    )
    max_calls = repeats * len(batches) * plan.micro_batches
    for rank, result in enumerate(ranks):
        lengths = [length * (plan.tensor if plan.sequence_parallel else 1) for _, length in result.layer_inputs]
        tokens = [rows * length for (rows, _), length in zip(result.layer_inputs, lengths, strict=True)]
        unpacked = [rows for (rows, _), length in zip(result.layer_inputs, lengths, strict=True) if length <= LENGTH]
        max_packed = bucket_size(plan.micro_batch_size * LENGTH, LENGTH_MULTIPLE)
        called = f"rank {rank}: a layer was called {len(tokens)} times"
        if plan.pipeline > 1:
            if len(tokens) != max_calls or result.layer_inputs[0][0] != plan.micro_batch_size:
                problems.append(f"{called}, first with {result.layer_inputs[0]}, but the plan means {max_calls} times")
        elif len(tokens) > max_calls or sum(unpacked) != unpacked_rows:
            problems.append(
                f"{called} with {result.layer_inputs}, but the plan means {unpacked_rows} rows that are not packed "
                f"in at most {max_calls} times"
            )
        max_tokens = [plan.micro_batch_size * LENGTH if length <= LENGTH else max_packed for length in lengths]
        if any(actual > allowed for actual, allowed in zip(tokens, max_tokens, strict=True)):
            problems.append(
                f"{called}, with {max(tokens)} tokens, but the plan means {plan.micro_batch_size} rows of {LENGTH}"
            )
    return problems


def compare(ranks, expected, steps):
    """The differences between what the ranks have together and the reference, and what is wrong."""
    problems = []
    weights, weight_replicas = _assemble(ranks, expected.weights, lambda shard: shard.weight)
    gradients, gradient_replicas = _assemble(ranks, expected.gradients, lambda shard: shard.gradient)
    for rank, result in enumerate(ranks):
        for name, shard in result.shards.items():
            if shard.gradient is None:
                problems.append(f"rank {rank}: {name} has no gradient")
            if shard.steps != steps:
                problems.append(f"rank {rank}: AdamW has made {shard.steps:g} steps with {name}")
    by_name = {
        "losses": _curve_differences(ranks, expected, "losses"),
        "norms": _curve_differences(ranks, expected, "norms"),
        "evaluation": _curve_differences(ranks, expected, "evaluation"),
        "logits": {
            f"of rank {rank}": relative_difference(result.curves.logits, expected.curves.logits)
            for rank, result in enumerate(ranks)
        },
        "gradients": {name: relative_difference(gradients[name], expected.gradients[name]) for name in gradients},
        "weights": {name: relative_difference(weights[name], expected.weights[name]) for name in weights},
        "replicas": {**weight_replicas, **{f"gradient of {name}": value for name, value in gradient_replicas.items()}},
    }
    for kind, differences in by_name.items():
        wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
        for name, value in list(wrong.items())[:3]:
            problems.append(f"{kind} {name}: {value:.1e}" + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    return Differences(**{kind: worst(differences.values()) for kind, differences in by_name.items()}), problems


def _curve_differences(ranks, expected, kind):
    """By rank, the worst relative difference of a curve."""
    reference_values = np.atleast_1d(getattr(expected.curves, kind))
    return {
        f"of rank {rank}": curve_difference(np.atleast_1d(getattr(result.curves, kind)), reference_values)
        for rank, result in enumerate(ranks)
    }


def _assemble(ranks, expected, value_of):
    """Whole tensors from the shards of all ranks, NaN where nobody holds an element.

    Returns them with the differences of ranks that hold the same elements, by parameter.
    """
    wholes = {name: np.full(tensor.shape, np.nan) for name, tensor in expected.items()}
    known = {name: np.zeros(tensor.shape, bool) for name, tensor in expected.items()}
    differences = dict.fromkeys(expected, 0.0)
    for result in ranks:
        for name, shard in result.shards.items():
            value, position = value_of(shard), 0
            if value is None:
                continue
            for box in shard.boxes:
                index = tuple(slice(start, stop) for start, stop in box)
                length = box[shard.dim][1] - box[shard.dim][0]
                part = value.take(range(position, position + length), shard.dim)
                position += length
                held, is_known = wholes[name][index], known[name][index]
                difference = worst(np.abs(held - part)[is_known]) / float(np.abs(expected[name]).max())
                differences[name] = worst([differences[name], difference])
                wholes[name][index] = np.where(is_known, held, part)
                known[name][index] = True
            if shard.boxes and position != value.shape[shard.dim]:
                differences[name] = np.inf
    return wholes, differences
