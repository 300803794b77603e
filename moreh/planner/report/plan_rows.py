"""Header lines and the table of the best plans, as data."""

from moreh.accelerator.devices import Device
from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.models.architecture import Architecture
from moreh.planner.cost.prediction import Prediction
from moreh.planner.hardware.efficiency import errors_text
from moreh.planner.optimizer_state import ADAMW, OptimizerState
from moreh.planner.plan.notation import plan_text
from moreh.planner.report.step_parts import short_overhead
from moreh.planner.search.constraints import constraints_text
from moreh.planner.search.request import Request
from moreh.planner.search.search import SearchResult
from moreh.planner.units import gib, percent_text, seconds_text
from moreh.tables import Column, Table

# Plans that are shown where no number is asked for.
DEFAULT_COUNT = 10
PLAN_COLUMNS = (
    Column("#", 4, "right"),
    Column("Plan", 4, wraps=True),
    Column("Memory per device", 4, "right"),
    Column("Step time", 4, "right"),
    Column("Tokens/s", 4, "right"),
    Column("MFU", 4, "right"),
    Column("Largest overhead", 4),
)


def uncertainty_text(device: Device) -> str:
    """The errors of the figures for a kind of device, in a line."""
    if device.efficiency_class == THIS_MACHINE:
        text = "All figures are predictions from rates measured on this machine."
        return text if device.name == THIS_MACHINE else f"No entry of devices.json has the name {device.name}. {text}"
    return f"All figures are predictions, not measurements. Predicted step times are {errors_text(device)}."


def header_pairs(request: Request, result: SearchResult | None = None, idle: str = "") -> list[tuple[str, str]]:
    """The planned training, as pairs of a word and a text.

    `idle` says why some devices have nothing to do; empty where all have something to do.
    """
    architecture, training, cluster = request.training.architecture, request.training, request.environment.cluster
    device_bytes = request.device.memory_bytes
    percent = f"{100 * request.constraints.memory_fraction:g}%"
    rows = [
        ("Model", f"{architecture.name}, {architecture.parameters:,} parameters{trained_text(architecture)}"),
        ("Accelerator", f"{request.accelerator} on {cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"),
        (
            "Memory",
            f"{gib(device_bytes)} per device, of which plans may use {percent}: {gib(request.limit_bytes)}",
        ),
        ("Step", f"{training.global_batch_size:,} x {training.sequence_length:,} tokens, {request.precision}"),
    ]
    if request.flavor is not None and not request.flavor.simulated:
        rows.insert(2, ("Device", request.device.source))
    if training.optimizer != ADAMW:
        rows.append(("Optimizer", optimizer_text(training.optimizer, cluster.devices)))
    decided = constraints_text(request.constraints)
    if decided:
        rows.append(("Constraints", decided))
    if result is not None:
        seconds = result.memory_s + result.search_s
        rows.append(("Search", f"{result.candidates:,} candidates, {result.possible:,} fit in memory, {seconds:.2f} s"))
    if idle:
        rows.append(("Idle", idle.replace(" stay idle", "", 1)))
    return [*rows, ("Note", uncertainty_text(request.device))]


def optimizer_text(optimizer: OptimizerState, devices: int) -> str:
    """An optimizer with the size of its state, and its costs that are not predicted."""
    matrices = "" if optimizer.matrix_values is None else f" ({optimizer.matrix_values:g} in the layers' matrices)"
    size = "" if optimizer.value_bytes is None else f" of {optimizer.value_bytes} bytes"
    text = f"{optimizer.name}, {optimizer.values:g} values of state{size} for each trained weight{matrices}"
    if devices > 1 and not optimizer.works_on_shards:
        return f"{text}; plans with tensor parallelism or sharding are left out, because it needs whole matrices"
    if devices == 1 or not optimizer.gathers_matrices:
        return text
    return f"{text}; it gathers each matrix that devices share, and the time for this is not predicted"


def trained_text(architecture: Architecture) -> str:
    """The numbers of parameters that a token uses and that are trained; empty if all are."""
    active, trained = architecture.active_parameters, architecture.trainable_parameters
    text = "" if active == architecture.parameters else f", {active:,} of them used by a token"
    return text if trained == architecture.parameters else f"{text}, {trained:,} of them trained"


def plan_table_forms(request: Request, result: SearchResult) -> list[Table]:
    """The table of the best plans, from the form with everything to the one for narrow terminals."""
    rows = tuple(
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
    )
    full = Table(PLAN_COLUMNS, rows)
    short = full.shortened("Memory per device", "Memory").shortened("Largest overhead", "Overhead", short_overhead)
    tight = short.tightened()
    two_lines = tight.wrapped(2)
    no_mfu = two_lines.without("MFU")
    no_percent = no_mfu.shortened("Memory", "Memory", without_percent)
    least = no_percent.without("Overhead")
    return [full, short, tight, two_lines, no_mfu, no_percent, least]


def memory_text(request: Request, prediction: Prediction) -> str:
    """The memory of the fullest device, and how much of the device that is."""
    share = prediction.memory_bytes / request.device.memory_bytes
    return f"{gib(prediction.memory_bytes)} ({share:.0%})"


def without_percent(text: str) -> str:
    """`memory_text` without the share of the device."""
    return text.partition(" (")[0]
