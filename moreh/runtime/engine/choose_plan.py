"""The plan of a training: searched for the accelerator with the documented log lines, and for this machine."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from moreh.accelerator.flavors import Flavor
from moreh.accelerator.job_status import PredictedUse
from moreh.errors import PlanError
from moreh.options import ParallelOptions, PlannerVariables
from moreh.planner.cost.prediction import DeviceMemory, Prediction, predict
from moreh.planner.hardware.cluster import cluster_for_flavor
from moreh.planner.hardware.efficiency import uncertainty
from moreh.planner.hardware.environment import make_environment, measured_environment
from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.plan import Plan, Recomputation, Training
from moreh.planner.search.constraints import Constraints, constraints_from_options
from moreh.planner.search.search import SearchResult, search, search_on_most_devices
from moreh.planner.software_profile import TRANSFORMERS, TRANSFORMERS_AUTOCAST, moreh_software
from moreh.planner.units import gib, seconds_text
from moreh.runtime.tensor.partition import max_tensor_parallel, sequence_parallel_refusal

SELECTED_CONFIG = "advanced_parallelization_selected_config.dump"
DETAILED_LOG = "autoconfig_log.dump"
# Plans that the detailed log lists.
DETAILED = 50
# Tokens of a micro-batch that matrix products and kernels need to be worth their start.
MIN_MICROBATCH_TOKENS = 4096
# What a smaller micro-batch may cost: it needs less memory.
MAX_SLOWDOWN = 1.05


@dataclass(frozen=True)
class Selection:
    """The plan that was selected for an accelerator; None where none fits, and then what the smallest one needs in bytes."""

    prediction: Prediction | None
    smallest_bytes: float


def select_plan(
    training: Training,
    flavor: Flavor,
    restrictions: Constraints,
    options: ParallelOptions,
    variables: PlannerVariables,
    say: Callable[[str], None],
) -> Selection:
    """Search the best plan for an accelerator, say the documented lines, and write the files into the current directory.

    Raises:
        PlanError: no plan divides the batch under the restrictions.
    """
    setting = make_environment(
        cluster_for_flavor(flavor), moreh_software("half" if options.mixed_precision else "float32")
    )
    outcome = search_on_most_devices(training, setting, restrictions, count=DETAILED, threads=variables.threads)
    found, idle = outcome.result, outcome.idle
    if idle:
        say(f"Simulated: {idle}")
    _say_search(found, say)
    if variables.detailed_log:
        lines = [_detail(place, prediction) for place, prediction in enumerate(found.best, start=1)]
        if variables.detailed_log == 1:
            for line in lines:
                say(line)
        else:
            _write(Path(DETAILED_LOG), lines, say)
    if not found.best:
        return Selection(None, found.smallest_bytes)
    best = found.best[0]
    line = selected_config(best.plan)
    _write(Path(SELECTED_CONFIG), [line], say)
    say("Configuration for parallelism is selected.")
    say(line)
    say("train: true")
    known = uncertainty(flavor.device.efficiency_class)
    say(
        f"Simulated: on {flavor.name} ({flavor.devices} x {flavor.device.name}) the plan '{plan_text(best.plan)}' is "
        f"predicted to take {seconds_text(best.step_time_s)} a step, {best.tokens_per_second:,.0f} tokens/s, {best.mfu:.1%} "
        f"of the peak, and {gib(best.memory_bytes)} of {gib(flavor.device.memory_bytes)} on the fullest device. "
        f"Step times came out {known.text}."
    )
    return Selection(best, found.smallest_bytes)


def _write(path: Path, lines: list[str], say: Callable[[str], None]) -> None:
    """Write a file of the log. A directory that cannot be written does not end a training."""
    try:
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        say(f"{path.name} is not written: {error}")


def _say_search(found: SearchResult, say: Callable[[str], None]) -> None:
    say(f"The number of candidates is {found.candidates}.")
    say("Parallel Graph Compile start...")
    say(f"Elapsed Time to compile all candidates = {found.memory_s * 1000:.0f} [ms]")
    say("Parallel Graph Compile finished.")
    say(f"The number of possible candidates is {found.possible}.")
    say("SelectBestGraphFromCandidates start...")
    say(f"Elapsed Time to compute cost for survived candidates = {found.search_s * 1000:.0f} [ms]")
    say("SelectBestGraphFromCandidates finished.")


def selected_config(plan: Plan) -> str:
    """A plan in the platform's words.

    >>> selected_config(Plan((10,) * 8, pipeline=8, data=8, micro_batches=64, recomputation="full", sharding="parameters"))
    'num_stages : 8, num_micro_batches : 64, batch_per_device : 1, No TP, recomputation : full(2), distribute_param : true, \
distribute_low_prec_param : false'
    """
    recomputation = {"none": "none(0)", "selective": "selective(1)", "full": "full(2)"}[plan.recomputation]
    return (
        f"num_stages : {plan.pipeline}, num_micro_batches : {plan.micro_batches}, batch_per_device : {plan.micro_batch_size}, "
        f"{f'TP {plan.tensor}' if plan.tensor > 1 else 'No TP'}, recomputation : {recomputation}, "
        f"distribute_param : {str(plan.sharding == 'parameters').lower()}, distribute_low_prec_param : false"
    )


def _detail(place: int, prediction: Prediction) -> str:
    plan = prediction.plan
    parts = ", ".join(
        f"{name.removesuffix('_s')} {getattr(prediction.parts, name):.3f} s"
        for name in prediction.parts.__dataclass_fields__
    )
    return (
        f"candidate {place}: {selected_config(plan)}, schedule : {plan.schedule}({plan.chunks}), sharding : {plan.sharding}, "
        f"data_parallel : {plan.data}, stage_layers : {list(plan.stage_layers)}; "
        f"simulated step {prediction.step_time_s:.3f} s ({parts}), {gib(prediction.memory_bytes)}"
    )


def predicted_use(prediction: Prediction, devices: int) -> PredictedUse:
    """What moreh-smi shows of a plan: memory of all devices together and of each, and how busy they are."""
    per_rank = prediction.plan.devices // prediction.plan.pipeline
    names = DeviceMemory.__dataclass_fields__
    total = {name: round(per_rank * sum(getattr(rank, name) for rank in prediction.memory)) for name in names}
    # Pipeline ranks are the farthest apart: the devices of a stage follow each other.
    used = [round(rank.total) for rank in prediction.memory for _ in range(per_rank)]
    device_bytes = (*used, *[0] * (devices - len(used)))
    busy = (prediction.parts.computation_s + prediction.parts.recomputation_s) / prediction.step_time_s
    return PredictedUse(
        plan_text(prediction.plan),
        {name: value for name, value in total.items() if value},
        device_bytes,
        min(1.0, busy),
    )


def select_local_plan(training: Training, options: ParallelOptions, *, bfloat16: bool) -> Prediction:
    """The plan for this machine's one worker: rows of a micro-batch, and recomputation or none.

    Of those that fit in memory and are hardly slower than the fastest, the one that needs the least; where nothing fits, too.
    """
    setting = measured_environment(1, TRANSFORMERS_AUTOCAST if bfloat16 else TRANSFORMERS)
    layers = (len(training.architecture.layers),)
    rows = training.global_batch_size
    # Selective recomputation is none that a model of transformers has a switch for.
    choices: dict[bool | str, tuple[Recomputation, ...]] = {True: ("full",), False: ("none",), "auto": ("none", "full")}
    plans = [
        Plan(layers, micro_batch_size=size, micro_batches=rows // size, recomputation=recomputation)
        for recomputation in choices[options.activation_recomputation]
        for size in range(1, rows + 1)
        if rows % size == 0 and size * training.sequence_length >= min(MIN_MICROBATCH_TOKENS, training.tokens)
    ]
    predictions = [predict(plan, training, setting) for plan in plans]
    fitting = [one for one in predictions if one.memory_bytes <= setting.cluster.device.memory_bytes]
    if not fitting:
        return min(predictions, key=lambda one: one.memory_bytes)
    enough = MAX_SLOWDOWN * min(one.step_time_s for one in fitting)
    return min((one for one in fitting if one.step_time_s <= enough), key=lambda one: one.memory_bytes)


def within_runtime_limits(restrictions: Constraints, model: nn.Module) -> Constraints:
    """Constraints with those besides that the model puts on what workers can carry out."""
    largest = max_tensor_parallel(model)
    possible = largest > 1 and sequence_parallel_refusal(model, largest) is None
    return replace(restrictions, max_tensor=largest, sequence_parallel=None if possible else False)


def select_worker_plan(
    model: nn.Module,
    training: Training,
    options: ParallelOptions,
    variables: PlannerVariables,
    workers: int,
    *,
    bfloat16: bool,
) -> Prediction:
    """The fastest plan that so many workers of this machine can carry out for a model, among those that fit their memory.

    A batch with too few rows is filled up with empty ones.

    Raises:
        PlanError: no plan divides the model under the options, or none fits the memory of the machine.
    """
    setting = measured_environment(workers, moreh_software("half" if bfloat16 else "float32"))
    restrictions = replace(
        within_runtime_limits(constraints_from_options(options, variables, workers), model), memory_fraction=1.0
    )
    try:
        found = search(training, setting, restrictions, count=1)
    except PlanError:
        rows = -(-training.global_batch_size // workers) * workers
        if rows == training.global_batch_size:
            raise
        found = search(replace(training, global_batch_size=rows), setting, restrictions, count=1)
    if not found.best:
        raise PlanError(
            f"the smallest plan for {workers} workers needs {gib(found.smallest_bytes)} in one of them, and each has "
            f"{gib(setting.cluster.device.memory_bytes)}: use fewer or larger machines' workers, or a smaller batch"
        )
    return found.best[0]
