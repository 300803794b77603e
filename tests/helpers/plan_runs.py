"""One plan on all workers, and how far its training is from that of a single process."""

import re
import time
from dataclasses import dataclass

import numpy as np

from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.plan import Plan
from moreh.runtime.batch.packing import LENGTH_MULTIPLE
from moreh.runtime.engine import registry as divided_models
from moreh.runtime.engine.parallel_model import local_tensor
from moreh.runtime.kernels.shape_buckets import bucket_size
from moreh.runtime.sharding.spec import shard_boxes
from tests.helpers.plan_cases import CALLS, LENGTH, STEPS, can_be_packed, rows_of_batch
from tests.helpers.plan_faults import FAULTS
from tests.helpers.plan_training import Curves, base_model, new_model, reference, train
from tests.helpers.workers import run_on_workers

TOLERANCE = 1e-9
# Until a plan that does not end is given up, and until the processes have been started, on a machine that is busy.
TIMEOUT_S, START_TIMEOUT_S = 300, 600


@dataclass(frozen=True)
class Part:
    """What a rank holds of a parameter: the boxes `[box, dimension, 2]` of the whole tensor and, concatenated along `dim`, the
    first step's gradient there and the weights in the end. `steps` is AdamW's count.
    """

    boxes: list
    dim: int
    gradient: np.ndarray | None
    weight: np.ndarray
    steps: float


@dataclass(frozen=True)
class RankResult:
    """`layer_inputs` are the shapes `[rows, tokens]` that one of the rank's layers was called with in training, repeated calls
    for recomputation among them.
    """

    curves: Curves
    parts: dict[str, Part]
    layer_inputs: list[tuple[int, int]]
    processor_s: float


def get_ready(family):
    """On each rank, once for all plans: what takes seconds."""
    divided_models.install_sharding_support()
    base_model(family)


def train_with_plan(family: str, plan: Plan, fault: str | None, steps: int) -> RankResult:
    """On each rank: the script's training on a model that is divided as the plan says."""
    started = time.process_time()
    made, layer_inputs = [], []

    def shard_model(root):
        made.append(divided_models.shard_model(root, plan).model)
        layer = made[0].stages[0].layers[0]
        # transformers repeats what is inside of a layer, without the layer's hooks.
        norm = next(part for part in layer.children() if all(parameter.dim() == 1 for parameter in part.parameters()))
        norm.register_forward_pre_hook(
            lambda norm, args: layer_inputs.append(tuple(args[0].shape[:2])) if norm.training else None
        )

    try:
        with FAULTS[fault]():
            done = train(new_model(family), shard_model, steps)
        (model,) = made
        mesh = model.mesh
        place = mesh.rank("tensor"), plan.tensor, mesh.rank("data"), plan.data
        parts = {}
        for name, parameter in model.user_params.items():
            layout, gradient = model.layouts[name], done.gradients[name]
            state = done.optimizer.state.get(parameter, {})
            parts[name] = Part(
                boxes=shard_boxes(layout, *place),
                dim=0 if layout.tp_split is None else layout.tp_split.dim,
                gradient=None if gradient is None else local_tensor(gradient).numpy(),
                weight=local_tensor(parameter.detach()).numpy(),
                steps=float(state.get("step", 0)),
            )
        return RankResult(done.curves, parts, layer_inputs, time.process_time() - started)
    finally:
        # Hundreds of models go through a process; no script divides more than a few.
        divided_models._divided.clear()


@dataclass(frozen=True)
class Differences:
    """The worst relative differences, of numbers to themselves and of elements to the largest of their tensor.

    `replicas` is between ranks that hold the same elements.
    """

    losses: float
    norms: float
    evaluation: float
    logits: float
    gradients: float
    weights: float
    replicas: float

    @property
    def worst(self) -> float:
        return max(vars(self).values())


@dataclass(frozen=True)
class Verdict:
    """What came out for a plan: the differences, all that is wrong (empty if nothing is), and its seconds, as well on all
    processors together.
    """

    family: str
    plan: Plan
    differences: Differences | None
    problems: tuple[str, ...]
    seconds: float = 0.0
    processor_s: float = 0.0

    @property
    def text(self) -> str:
        return f"{self.family}: {plan_text(self.plan)}"


def verify(family, plan, fault=None, steps=STEPS, timeout=TIMEOUT_S):
    """Run a plan and compare it. A plan that fails or hangs gives a verdict too."""
    run_on_workers(get_ready, [(family,)], size=plan.devices, timeout=START_TIMEOUT_S)
    started = time.perf_counter()
    try:
        (ranks,) = run_on_workers(train_with_plan, [(family, plan, fault, steps)], size=plan.devices, timeout=timeout)
    except AssertionError as error:
        return Verdict(family, plan, None, (str(error),), time.perf_counter() - started)
    seconds = time.perf_counter() - started
    expected = reference(family, steps)
    differences, problems = compare(ranks, expected, steps)
    problems += not_as_planned(ranks, expected.weights, plan, steps)
    return Verdict(family, plan, differences, tuple(problems), seconds, sum(rank.processor_s for rank in ranks))


def not_as_planned(ranks, weights, plan, steps):
    """What the ranks have held or computed otherwise than the plan says: an undivided model would be right, too."""
    problems = []
    copies = plan.data if plan.sharding == "none" else 1
    for name, weight in weights.items():
        held = sum(result.parts[name].weight.size for result in ranks if name in result.parts)
        # Each matrix of a layer is in one stage, and divided by tensor and data parallelism.
        if re.search(r"\.\d+\.", name) and weight.ndim == 2 and held != copies * weight.size:
            problems.append(f"{name} is held {held / weight.size:g} times, but the plan means {copies}")
    numbers = range(sum(CALLS[:steps]))
    repeats = 1 if plan.recomputation == "none" else 2
    rows = repeats * sum(-(-rows_of_batch(number) // plan.data) for number in numbers if not can_be_packed(number))
    most_calls = repeats * len(numbers) * plan.micro_batches
    for rank, result in enumerate(ranks):
        widths = [width * (plan.tensor if plan.sequence_parallel else 1) for _, width in result.layer_inputs]
        tokens = [calls * width for (calls, _), width in zip(result.layer_inputs, widths, strict=True)]
        unpacked = [calls for (calls, _), width in zip(result.layer_inputs, widths, strict=True) if width <= LENGTH]
        most_packed = bucket_size(plan.micro_batch_size * LENGTH, LENGTH_MULTIPLE)
        seen = f"rank {rank}: a layer was called {len(tokens)} times"
        if plan.pipeline > 1:
            if len(tokens) != most_calls or result.layer_inputs[0][0] != plan.micro_batch_size:
                problems.append(f"{seen}, first with {result.layer_inputs[0]}, but the plan means {most_calls} times")
        elif len(tokens) > most_calls or sum(unpacked) != rows:
            problems.append(
                f"{seen} with {result.layer_inputs}, but the plan means {rows} rows that are not packed in at most "
                f"{most_calls} times"
            )
        most_tokens = [plan.micro_batch_size * LENGTH if width <= LENGTH else most_packed for width in widths]
        if any(found > most for found, most in zip(tokens, most_tokens, strict=True)):
            problems.append(
                f"{seen}, with {max(tokens)} tokens, but the plan means {plan.micro_batch_size} rows of {LENGTH}"
            )
    return problems


def compare(ranks, expected, steps):
    """The differences between what the ranks have together and the reference, and what is wrong."""
    problems = []
    weights, weight_replicas = _assemble(ranks, expected.weights, lambda part: part.weight)
    gradients, gradient_replicas = _assemble(ranks, expected.gradients, lambda part: part.gradient)
    for rank, result in enumerate(ranks):
        for name, part in result.parts.items():
            if part.gradient is None:
                problems.append(f"rank {rank}: {name} has no gradient")
            if part.steps != steps:
                problems.append(f"rank {rank}: AdamW has made {part.steps:g} steps with {name}")
    named = {
        "losses": _curves(ranks, expected, "losses"),
        "norms": _curves(ranks, expected, "norms"),
        "evaluation": _curves(ranks, expected, "evaluation"),
        "logits": {
            f"of rank {rank}": _distance(r.curves.logits, expected.curves.logits) for rank, r in enumerate(ranks)
        },
        "gradients": {name: _distance(gradients[name], expected.gradients[name]) for name in gradients},
        "weights": {name: _distance(weights[name], expected.weights[name]) for name in weights},
        "replicas": {**weight_replicas, **{f"gradient of {name}": value for name, value in gradient_replicas.items()}},
    }
    for kind, found in named.items():
        wrong = {name: value for name, value in found.items() if not value <= TOLERANCE}
        for name, value in list(wrong.items())[:3]:
            problems.append(f"{kind} {name}: {value:.1e}" + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    return Differences(**{kind: max(found.values()) for kind, found in named.items()}), problems


def _curves(ranks, expected, kind):
    """By rank, the worst relative difference of a curve."""
    reference_values = np.atleast_1d(getattr(expected.curves, kind))
    values = {rank: np.atleast_1d(getattr(result.curves, kind)) for rank, result in enumerate(ranks)}
    return {f"of rank {rank}": _worst(np.abs(v / reference_values - 1)) for rank, v in values.items()}


def _distance(actual, expected):
    return _worst(np.abs(actual - expected)) / float(np.abs(expected).max())


def _worst(differences):
    """The largest; infinite where one is not a number."""
    return float(np.nan_to_num(differences, nan=np.inf, posinf=np.inf).max(initial=0.0))


def _assemble(ranks, expected, value_of):
    """Whole tensors from the parts of all ranks, not a number where nobody holds an element; and by parameter, how far ranks
    that hold the same elements are apart.
    """
    wholes = {name: np.full(tensor.shape, np.nan) for name, tensor in expected.items()}
    known = {name: np.zeros(tensor.shape, bool) for name, tensor in expected.items()}
    apart = dict.fromkeys(expected, 0.0)
    for result in ranks:
        for name, part in result.parts.items():
            value, position = value_of(part), 0
            if value is None:
                continue
            for box in part.boxes:
                index = tuple(slice(start, stop) for start, stop in box)
                length = box[part.dim][1] - box[part.dim][0]
                piece = value.take(range(position, position + length), part.dim)
                position += length
                held, seen = wholes[name][index], known[name][index]
                apart[name] = max(apart[name], _worst(np.abs(held - piece)[seen]) / float(np.abs(expected[name]).max()))
                wholes[name][index] = np.where(seen, held, piece)
                known[name][index] = True
            if part.boxes and position != value.shape[part.dim]:
                apart[name] = np.inf
    return wholes, apart
