"""Reads measured steps for `moreh-plan --calibrate`: one JSON object per line."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moreh.accelerator.devices import Device, device_of_driver, find_device
from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.cli.cluster_file import MAX_COUNT
from moreh.errors import AcceleratorError, MorehError, PlanError
from moreh.models.architecture import Architecture
from moreh.models.describe.from_source import describe
from moreh.options import did_you_mean
from moreh.planner.calibration.measured_step import MeasuredStep
from moreh.planner.hardware.cluster import Cluster, cluster_for_devices
from moreh.planner.hardware.environment import Environment
from moreh.planner.optimizer_state import OPTIMIZER_STATES, optimizer_state
from moreh.planner.plan.notation import parse_plan
from moreh.planner.plan.plan import Training
from moreh.planner.units import GIB

# The file of a run of the scripts, in its directory.
MEASURED_FILE = "measured.jsonl"


@dataclass(frozen=True)
class MeasuredLine:
    """A line of the file. What is None is as in the command that reads it."""

    plan: str
    """The plan, in the notation of `moreh-plan`."""
    batch_size: int
    """Sequences of a step, over all devices."""
    sequence_length: int
    """Tokens of a sequence, without padding that the program skips."""
    step_time_s: float
    """Seconds of a step: the median of several, without the first ones."""
    memory_gib: float | None = None
    """`torch.cuda.max_memory_allocated()` of the fullest device, in GiB."""
    model: str | None = None
    """A config.json, relative to the directory of the file or to the current one, or a name on the hub."""
    device: str | None = None
    """A kind of device of `moreh-plan --help`, a driver's name for one, or "this machine"."""
    devices: int | None = None
    """The number of devices."""
    optimizer: str | None = None
    """The optimizer, as in `moreh-plan --optimizer`."""


KEYS = tuple(field.name for field in fields(MeasuredLine))
_REQUIRED = KEYS[:4]
_WHOLE = ("batch_size", "sequence_length", "devices")
_NUMBERS = ("step_time_s", "memory_gib")


def read_measured_steps(path: Path, training: Training, environment: Environment) -> list[MeasuredStep]:
    """The measured steps of a file, or of the directory of a run.

    Args:
        training: What the command plans for: its model and optimizer are those of lines that name none.
        environment: Where the command plans to train: its devices are those of lines that name none, and its program is
            that of all lines.

    Raises:
        PlanError: the file cannot be read or has no line, or a line is not valid; one line names the first problem.
    """
    file = path / MEASURED_FILE if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        hint = f": a run of the scripts writes {MEASURED_FILE} at its end" if path.is_dir() else ""
        raise PlanError(f"{file}: there is no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{file}: cannot be read: {error}") from None
    steps = []
    architectures: dict[str, Architecture] = {}
    for number, text in enumerate(lines, start=1):
        if text.strip():
            line = _read_line(f"{file}:{number}", text)
            try:
                steps.append(_measured_step(line, file.parent, training, environment, architectures))
            except MorehError as error:
                raise PlanError(f"{file}:{number}: {error}") from None
    if not steps:
        raise PlanError(f"{file}: it has no measured step: give a line such as {_example()}")
    return steps


def _example() -> str:
    example = {"plan": "tp2 pp1 dp4 mb1x8", "batch_size": 32, "sequence_length": 4096, "step_time_s": 3.2}
    return json.dumps(example)


def _read_line(where: str, text: str) -> MeasuredLine:
    """The values of a line.

    Raises:
        PlanError: a key is missing or unknown, or a value has another type.
    """
    try:
        values: Any = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise PlanError(f"{where}: not a JSON object: give a line such as {_example()}")
    for key in values:
        if key not in KEYS:
            raise PlanError(
                f"{where}: unknown key {key}{did_you_mean(key, KEYS) or '.'} The keys are {', '.join(KEYS)}"
            )
    given = {key: value for key, value in values.items() if value is not None}
    for key in _REQUIRED:
        if key not in given:
            raise PlanError(f"{where}: {key} is missing: give a line such as {_example()}")
    for key, value in given.items():
        if (allowed := _allowed(key, value)) is not None:
            raise PlanError(f"{where}: {key} is {value!r}: give {allowed}")
    return MeasuredLine(**given)


def _allowed(key: str, value: Any) -> str | None:
    """The allowed values of a key, if the given one is not allowed."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _WHOLE:
        is_whole = isinstance(value, int) and is_number and 1 <= value <= MAX_COUNT * 1000
        return None if is_whole else "a whole number of at least 1"
    if key in _NUMBERS:
        return None if is_number and 0 < value < float("inf") else "a number above 0"
    if key == "optimizer":
        return None if value in OPTIMIZER_STATES else f"one of {', '.join(OPTIMIZER_STATES)}"
    return None if isinstance(value, str) and value.strip() else "a string"


def _measured_step(
    line: MeasuredLine,
    directory: Path,
    training: Training,
    environment: Environment,
    architectures: dict[str, Architecture],
) -> MeasuredStep:
    architecture = training.architecture
    if line.model is not None:
        if line.model not in architectures:
            beside = directory / line.model
            architectures[line.model] = describe(beside if beside.exists() else line.model)
        architecture = architectures[line.model]
    optimizer = training.optimizer if line.optimizer is None else optimizer_state(line.optimizer, {})
    measured = Training(architecture, line.batch_size, line.sequence_length, optimizer)
    cluster = _cluster(line, environment.cluster)
    return MeasuredStep(
        plan=parse_plan(line.plan, measured, cluster.devices),
        training=measured,
        cluster=cluster,
        step_time_s=line.step_time_s,
        memory_bytes=None if line.memory_gib is None else line.memory_gib * GIB,
        software=environment.software,
    )


def _cluster(line: MeasuredLine, asked: Cluster) -> Cluster:
    """The devices of a line. Links that the user stated for the command hold for the same kind of device."""
    device = asked.device if line.device is None else _device(line.device, asked.device)
    devices = line.devices or asked.devices
    if device == asked.device:
        return Cluster(device, devices, min(devices, asked.device.devices_per_node))
    return cluster_for_devices(device, devices)


def _device(name: str, asked: Device) -> Device:
    """The kind of device that a line names, the one that the command plans for where that is meant."""
    if name.strip().lower() in (asked.name.lower(), THIS_MACHINE) and asked.efficiency_class == THIS_MACHINE:
        return asked
    if name.strip().lower() == THIS_MACHINE:
        raise PlanError(
            f"it was measured on the CPU of a machine, which says nothing about {asked.name}: plan with --device "
            f"'{THIS_MACHINE}', or give steps measured on {asked.name}"
        )
    try:
        device = find_device(name)
    except AcceleratorError:
        known = device_of_driver(name, asked.compute_units)
        if known is None:
            raise
        device = known
    # The command's device may have other links than its kind, as the user states them.
    return asked if device_of_driver(asked.name, asked.compute_units) is device else device
