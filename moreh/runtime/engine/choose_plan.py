"""Chooses two plans for a training run: the accelerator's, with the platform's log and files, and this machine's.

The hook calls this module before a model's first training batch. The planner does the search.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from moreh.accelerator.devices import Device
from moreh.accelerator.flavors import Flavor
from moreh.accelerator.job_status import PredictedUse
from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.errors import PlanError
from moreh.options import ParallelOptions, PlannerVariables
from moreh.planner.cost.prediction import DeviceMemory, Prediction, predict
from moreh.planner.hardware.cluster import cluster_for_flavor
from moreh.planner.hardware.efficiency import errors_text
from moreh.planner.hardware.environment import Environment, make_environment, measured_environment
from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.plan import Plan, Recomputation, Training
from moreh.planner.report.chosen_plan import memory_text
from moreh.planner.report.platform_lines import detailed_line, selected_config
from moreh.planner.search.attainable import attainable, lowered_options
from moreh.planner.search.constraints import Constraints, constraints_from_options
from moreh.planner.search.relaxations import has_candidates
from moreh.planner.search.request import Request
from moreh.planner.search.search import SearchResult, search, search_on_most_devices
from moreh.planner.software_profile import SoftwareProfile, moreh_on_cpu, moreh_software, worker_software
from moreh.planner.units import gib, seconds_text
from moreh.runtime.batch.packing import max_row_tokens
from moreh.runtime.sharding.local_weights import has_half_weights
from moreh.runtime.tensor.partition import max_tensor_parallel, sequence_parallel_refusal

SELECTED_CONFIG = "advanced_parallelization_selected_config.dump"
DETAILED_LOG = "autoconfig_log.dump"
# How many plans the detailed log lists.
NUM_DETAILED_PLANS = 50
# In a smaller micro-batch, launching a kernel takes longer than the kernel computes.
MIN_MICROBATCH_TOKENS = 4096
# How many times the fastest plan's step time a plan with smaller micro-batches may take, because it needs less memory.
MAX_SLOWDOWN = 1.05


@dataclass(frozen=True)
class Selection:
    """The selected plan for an accelerator."""

    prediction: Prediction | None
    """The best plan with its prediction; None if no plan fits the memory."""
    smallest_bytes: float
    """Bytes that the smallest plan needs on its fullest device."""


def select_plan(
    training: Training,
    flavor: Flavor,
    constraints: Constraints,
    options: ParallelOptions,
    variables: PlannerVariables,
    log: Callable[[str], None],
    *,
    bfloat16: bool,
    half_weights: bool,
) -> Selection:
    """Search for an accelerator's best plan; log the platform's lines and write its files to the current directory.

    With `MOREH_PLATFORM_LINES=0`, one line of the plan replaces the platform's lines.

    Args:
        bfloat16: The workers compute in bfloat16 with float32 weights. It has no effect on a simulated accelerator.
        half_weights: The weights are in half precision.

    Raises:
        PlanError: no plan divides the batch under the constraints.
    """
    mixed_precision = options.mixed_precision if flavor.simulated else bfloat16
    software = moreh_software("half" if mixed_precision else "float32", half_weights=half_weights)
    environment = make_environment(cluster_for_flavor(flavor), software)
    attained = attainable(Request(training, environment, constraints)).constraints
    for text in lowered_options(constraints, attained):
        log(text)
    outcome = search_on_most_devices(
        training, environment, attained, count=NUM_DETAILED_PLANS, threads=variables.threads
    )
    result = outcome.result
    if outcome.idle:
        log(f"{_prefix(flavor)}: {outcome.idle}")
    if variables.platform_lines:
        _log_search(result, log)
    if variables.detailed_log:
        _log_candidates(result, flavor, variables, log)
    if not result.best:
        return Selection(None, result.smallest_bytes)
    best = result.best[0]
    _write(Path(SELECTED_CONFIG), [selected_config(best.plan)], log)
    _log_selected(best, flavor, environment.cluster.device, variables, log)
    return Selection(best, result.smallest_bytes)


def _log_candidates(
    result: SearchResult, flavor: Flavor, variables: PlannerVariables, log: Callable[[str], None]
) -> None:
    """List the best candidates on the console or in a file."""
    word = "simulated" if flavor.simulated else "predicted"
    lines = [detailed_line(rank, prediction, word) for rank, prediction in enumerate(result.best, start=1)]
    if variables.detailed_log == 1:
        for line in lines:
            log(line)
    else:
        _write(Path(DETAILED_LOG), lines, log)


def _log_selected(
    best: Prediction, flavor: Flavor, device: Device, variables: PlannerVariables, log: Callable[[str], None]
) -> None:
    """Log the plan; `device` is the flavor's, with its measured rates if no entry of devices.json describes it."""
    devices = f"{flavor.devices} x {flavor.device.name}"
    if not variables.platform_lines:
        log(
            f"{_prefix(flavor)}: {plan_text(best.plan)} on {devices}: {seconds_text(best.step_time_s)} a step, "
            f"{gib(best.memory_bytes)}"
        )
        return
    log("Configuration for parallelism is selected.")
    log(selected_config(best.plan))
    log("train: true")
    log(
        f"{_prefix(flavor)}: on {flavor.name} ({devices}) the plan '{plan_text(best.plan)}' is "
        f"predicted to take {seconds_text(best.step_time_s)} a step, {best.tokens_per_second:,.0f} tokens/s, "
        f"{best.mfu:.1%} of the peak, and {memory_text(best, flavor)} of {gib(device.memory_bytes)} on the "
        f"fullest device. {_uncertainty_text(device)}"
    )


def _prefix(flavor: Flavor) -> str:
    """The beginning of a line about a plan for these devices."""
    return "Simulated" if flavor.simulated else "Planned"


def _uncertainty_text(device: Device) -> str:
    """The error of predicted step times on a kind of device."""
    if device.efficiency_class == THIS_MACHINE:
        return "Rates were measured on this machine."
    return f"Predicted step times are {errors_text(device)}."


def _write(path: Path, lines: list[str], log: Callable[[str], None]) -> None:
    """Write a file of the log. A file that cannot be written is logged and does not stop the training run."""
    try:
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        log(f"{path.name} is not written: {error}")


def _log_search(result: SearchResult, log: Callable[[str], None]) -> None:
    log(f"The number of candidates is {result.candidates}.")
    log("Parallel Graph Compile start...")
    log(f"Elapsed Time to compile all candidates = {result.memory_s * 1000:.0f} [ms]")
    log("Parallel Graph Compile finished.")
    log(f"The number of possible candidates is {result.possible}.")
    log("SelectBestGraphFromCandidates start...")
    log(f"Elapsed Time to compute cost for survived candidates = {result.search_s * 1000:.0f} [ms]")
    log("SelectBestGraphFromCandidates finished.")


def predicted_use(prediction: Prediction, devices: int) -> PredictedUse:
    """The figures of a plan for moreh-smi: the memory of all devices and of each in bytes, and the utilization."""
    devices_per_rank = prediction.plan.devices // prediction.plan.pipeline
    names = DeviceMemory.__dataclass_fields__
    total = {name: round(devices_per_rank * sum(getattr(rank, name) for rank in prediction.memory)) for name in names}
    # Pipeline ranks are the outermost dimension, so the devices of one pipeline rank are consecutive.
    used = [round(rank.total) for rank in prediction.memory for _ in range(devices_per_rank)]
    device_bytes = (*used, *[0] * (devices - len(used)))
    utilization = (prediction.parts.computation_s + prediction.parts.recomputation_s) / prediction.step_time_s
    return PredictedUse(
        plan_text(prediction.plan),
        {name: value for name, value in total.items() if value},
        device_bytes,
        min(1.0, utilization),
    )


def local_environment(flavor: Flavor, workers: int, software: SoftwareProfile) -> Environment:
    """The environment of `workers` workers: the GPUs of `flavor` or, if it is simulated, this machine as measured.

    Raises:
        PlanError: this machine cannot have that number of workers, or the measurement failed.
        RegistryError: the state directory, where measurements are cached, cannot be used.
    """
    if flavor.simulated:
        return measured_environment(workers, software)
    return make_environment(cluster_for_flavor(flavor), software)


def usable_fraction(flavor: Flavor, variables: PlannerVariables) -> float:
    """The share (0 to 1) of a worker's memory that its plan may use: of a CPU's free memory, all."""
    return 1.0 if flavor.simulated else variables.memory_percent / 100


def select_local_plan(
    training: Training,
    flavor: Flavor,
    options: ParallelOptions,
    variables: PlannerVariables,
    *,
    bfloat16: bool,
    half_weights: bool,
) -> Prediction:
    """The plan for this machine's one worker: the rows of a micro-batch, and recomputation or none.

    Of the plans that fit the memory and take at most `MAX_SLOWDOWN` times the fastest plan's time, it is the one that
    needs the least memory. If no plan fits, it is the one that needs the least memory of all.
    """
    environment = local_environment(flavor, 1, worker_software(bfloat16=bfloat16, half_weights=half_weights))
    limit_bytes = environment.cluster.device.memory_bytes * usable_fraction(flavor, variables)
    layers = (len(training.architecture.layers),)
    batch_size = training.global_batch_size
    # Models of transformers have no switch for selective recomputation.
    choices: dict[bool | str, tuple[Recomputation, ...]] = {True: ("full",), False: ("none",), "auto": ("none", "full")}
    plans = [
        Plan(layers, micro_batch_size=size, micro_batches=batch_size // size, recomputation=recomputation)
        for recomputation in choices[options.activation_recomputation]
        for size in range(1, batch_size + 1)
        if batch_size % size == 0 and size * training.sequence_length >= min(MIN_MICROBATCH_TOKENS, training.tokens)
    ]
    predictions = [predict(plan, training, environment) for plan in plans]
    fitting = [p for p in predictions if p.memory_bytes <= limit_bytes]
    if not fitting:
        return min(predictions, key=lambda prediction: prediction.memory_bytes)
    max_step_time_s = MAX_SLOWDOWN * min(prediction.step_time_s for prediction in fitting)
    fast_enough = [prediction for prediction in fitting if prediction.step_time_s <= max_step_time_s]
    return min(fast_enough, key=lambda prediction: prediction.memory_bytes)


def within_runtime_limits(constraints: Constraints, model: nn.Module) -> Constraints:
    """The constraints, narrowed to the tensor and sequence parallelism that the runtime supports for the model.

    A module of the script's own may read more than the part of a tensor that a tensor-parallel rank has.
    """
    # It imports transformers, which takes seconds; one worker never comes here.
    from moreh.models.compatibility import unsupported_module

    max_tensor = max_tensor_parallel(model) if unsupported_module(model) is None else 1
    has_sequence_parallel = max_tensor > 1 and sequence_parallel_refusal(model, max_tensor) is None
    return replace(constraints, max_tensor=max_tensor, sequence_parallel=None if has_sequence_parallel else False)


def select_worker_plan(
    model: nn.Module,
    training: Training,
    flavor: Flavor,
    options: ParallelOptions,
    variables: PlannerVariables,
    workers: int,
    *,
    bfloat16: bool,
) -> Prediction:
    """The fastest plan that this machine's workers can run for a model and that fits their memory.

    If no plan divides the batch, it is planned with empty rows up to a multiple of the number of workers. Options for
    more stages or micro-batches than a plan for these workers can have are maxima.

    Raises:
        PlanError: no plan divides the model under the options, or none fits the memory of the machine.
    """
    software = (moreh_on_cpu if flavor.simulated else moreh_software)(
        "half" if bfloat16 else "float32", half_weights=has_half_weights(model)
    )
    environment = local_environment(flavor, workers, software)
    packs_rows = flavor.simulated and options.uses("pack_rows")
    constraints = replace(
        within_runtime_limits(constraints_from_options(options, variables, workers), model),
        memory_fraction=usable_fraction(flavor, variables),
        max_micro_batch_tokens=max_row_tokens(training.sequence_length) if packs_rows else None,
    )
    request = Request(training, environment, constraints)
    if not has_candidates(request):
        batch_size = -(-training.global_batch_size // workers) * workers
        padded = replace(request, training=replace(training, global_batch_size=batch_size))
        request = attainable(padded, all_devices=True)
    result = search(request.training, environment, request.constraints, count=1)
    if not result.best:
        remedy = "fewer workers, a machine with more memory," if flavor.simulated else "more GPUs"
        raise PlanError(
            f"the smallest plan for {workers} workers needs {gib(result.smallest_bytes)} on one of them, and each has "
            f"{gib(request.limit_bytes)}: use {remedy} or a smaller batch"
        )
    return result.best[0]
