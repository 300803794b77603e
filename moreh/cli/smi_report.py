"""Formats the data that moreh-smi shows, as tables or JSON."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from moreh.accelerator.job_status import measured_worker_bytes
from moreh.cli.smi_collect import AcceleratorReport, PhysicalDevice, PhysicalGpu, physical_devices
from moreh.console.printable import in_one_line
from moreh.tables import Column, draw_table, terminal_width, wrap_line
from moreh.version import __version__

NAME = "MoAI Accelerator"
SIMULATED_NOTE = (
    "Memory usage and utilization are simulated: the job computes on this machine's CPU. "
    "Memory is what its tensors would take on the device; utilization is the share of the cores that it uses."
)
PREDICTED_NOTE = (
    "Memory usage and utilization are simulated: the job computes on this machine's CPU. "
    "Memory is what the plan '{plan}' is predicted to use; utilization is the share of the cores that the job uses, "
    "times the predicted share of a step in which a device computes."
)
DEVICE_COLUMNS = (
    Column("Device", 6),
    Column("Name", 17, "right"),
    Column("Model", 11),
    Column("Memory Usage", 12),
    Column("Total Memory", 12),
    Column("Utilization", 11),
)
PROCESS_COLUMNS = (
    Column("Device", 6, "right"),
    Column("Job ID", 6, "right"),
    Column("PID", 7, "right"),
    Column("Process", 27),
    Column("Memory Usage", 12),
)
PHYSICAL_COLUMNS = (
    Column("Device", 6, "right"),
    Column("Physical", 8, "right"),
    Column("Node", 4, "right"),
    Column("Name", 9),
    Column("Memory Usage", 12),
    Column("Total Memory", 12),
    Column("Utilization", 11),
)
# Of the GPUs of this machine only.
SENSOR_COLUMNS = (Column("Temperature", 11), Column("Power", 5))
WORKER_COLUMNS = (
    Column("Job ID", 6, "right"),
    Column("Worker", 6, "right"),
    Column("PID", 7, "right"),
    Column("Measured Memory", 15),
)
PROGRESS_COLUMNS = (
    Column("Job ID", 6, "right"),
    Column("Step", 13, "right"),
    Column("Done", 4, "right"),
    Column("Loss", 8, "right"),
    Column("Tokens/s", 9, "right"),
    Column("Time Left", 9, "right"),
)
GPU_NOTE = (
    "Memory usage and utilization of this machine's GPUs are what their driver says, of all processes together; N/A is "
    "what it says only with pynvml (pip install nvidia-ml-py) or amdsmi."
)
WORKERS_NOTE = "Measured memory is what a worker's process holds in this machine's memory, code and libraries included."
# What the tools of drivers print for a figure that a GPU does not report.
NOT_TOLD = "N/A"
# The width of a table if standard output is no terminal, and the part of it that is not the process's command.
PIPE_WIDTH, REST_OF_TABLE, MIN_COMMAND_WIDTH = 200, 70, 27


def draw_reports(reports: Sequence[AcceleratorReport], *, physical: bool) -> str:
    """The platform's tables: accelerators, physical devices if asked for, and running processes; below them, notes."""
    width = terminal_width()
    parts = [
        datetime.now().strftime("%H:%M:%S %B %d, %Y"),
        _draw(
            DEVICE_COLUMNS,
            [_device_row(report) for report in reports],
            # Nobody is asked over the network which version is the latest.
            title=f"Current Version: {__version__}  Latest Version: -",
        ),
    ]
    if physical:
        has_sensors = any(report.gpus for report in reports)
        rows = [
            _physical_row(report, device) + (_sensor_cells(device) if has_sensors else ())
            for report in reports
            for device in physical_devices(report)
        ]
        parts += ["", _draw(PHYSICAL_COLUMNS + (SENSOR_COLUMNS if has_sensors else ()), rows)]
    running = [report for report in reports if report.job is not None]
    workers = [row for report in running for row in _worker_rows(report)] if physical else []
    if workers:
        parts += ["", "Workers:", _draw(WORKER_COLUMNS, workers), wrap_line(WORKERS_NOTE, width)]
    if running:
        parts += ["", "Processes:", _draw(PROCESS_COLUMNS, [_process_row(report) for report in running])]
    progress = [row for report in running for row in _progress_rows(report)]
    if progress:
        parts += ["", "Progress (measured):", _draw(PROGRESS_COLUMNS, progress)]
    simulated = [report.status for report in reports if report.status is not None and report.status.simulated]
    notes = [PREDICTED_NOTE.format(plan=s.predicted.plan) if s.predicted else SIMULATED_NOTE for s in simulated]
    if any(report.gpus for report in reports):
        notes.append(GPU_NOTE)
    for note in dict.fromkeys(notes):
        parts += ["", wrap_line(note, width)]
    return "\n".join(parts)


def _draw(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str | None = None) -> str:
    """A table in the platform's layout; with single blanks around its cells in a terminal that is too narrow for it."""
    table = draw_table(columns, rows, title)
    is_too_wide = table.index("\n") > shutil.get_terminal_size((PIPE_WIDTH, 24)).columns
    return draw_table(columns, rows, title, margin=1) if is_too_wide else table


def as_json(reports: Sequence[AcceleratorReport], *, physical: bool) -> dict[str, Any]:
    """The reports for machines. What is not known is null; memory is in MiB and, by kind, in bytes."""
    rows = []
    for report in reports:
        flavor = report.accelerator.flavor
        row: dict[str, Any] = {
            "index": report.accelerator.index,
            "current": report.is_current,
            "name": NAME,
            "model": flavor.name,
            "memory_used_mib": report.memory_mib,
            "memory_total_mib": report.total_memory_mib,
            "utilization_percent": report.utilization_percent,
            "simulated": _is_simulated(report),
            "predicted_for_plan": None
            if report.status is None or report.status.predicted is None
            else report.status.predicted.plan,
            "processes": [],
        }
        if report.job is not None:
            status, job = report.status, report.job
            progress = None if status is None or status.progress is None else asdict(status.progress)
            row["processes"].append(
                {
                    "job_id": job.id,
                    "pid": job.pid,
                    "command": job.command,
                    "memory_bytes": None if status is None else status.memory_bytes,
                    "progress": progress,
                }
            )
        if physical:
            row["physical_devices"] = [asdict(device) for device in physical_devices(report)]
            measured = [] if report.status is None else measured_worker_bytes(report.status)
            row["workers"] = [{"rank": rank, "pid": pid, "memory_bytes": size} for rank, pid, size in measured]
        rows.append(row)
    return {"version": __version__, "accelerators": rows}


def _device_row(report: AcceleratorReport) -> tuple[str, ...]:
    busy = report.job is not None
    return (
        f"{'*' if report.is_current else ' '} {report.accelerator.index}",
        NAME,
        report.accelerator.flavor.name,
        _mib(report.memory_mib),
        _mib(report.total_memory_mib if busy or report.gpus else None),
        _percent(report.utilization_percent, NOT_TOLD if report.gpus else "-"),
    )


def _process_row(report: AcceleratorReport) -> tuple[str, ...]:
    assert report.job is not None
    return (
        str(report.accelerator.index),
        str(report.job.id),
        str(report.job.pid),
        _in_table(report.job.command),
        _mib(report.job_memory_mib),
    )


def _progress_rows(report: AcceleratorReport) -> list[tuple[str, ...]]:
    assert report.job is not None
    progress = None if report.status is None else report.status.progress
    if progress is None:
        return []
    return [
        (
            str(report.job.id),
            f"{progress.step} of {progress.total_steps}",
            f"{progress.step / progress.total_steps:.0%}",
            f"{progress.loss:.4f}",
            f"{progress.tokens_per_s:,.0f}",
            progress.time_left or "-",
        )
    ]


def _worker_rows(report: AcceleratorReport) -> list[tuple[str, ...]]:
    assert report.job is not None
    measured = [] if report.status is None else measured_worker_bytes(report.status)
    return [(str(report.job.id), str(rank), str(pid), _mib(-(-size // 2**20))) for rank, pid, size in measured]


def _physical_row(report: AcceleratorReport, device: PhysicalDevice) -> tuple[str, ...]:
    return (
        str(report.accelerator.index),
        str(device.index),
        str(device.node),
        device.name,
        _mib(device.memory_used_mib),
        _mib(device.memory_total_mib),
        _percent(device.utilization_percent, NOT_TOLD if isinstance(device, PhysicalGpu) else "-"),
    )


def _sensor_cells(device: PhysicalDevice) -> tuple[str, ...]:
    """The cells of SENSOR_COLUMNS."""
    if not isinstance(device, PhysicalGpu):
        return ("-", "-")
    temperature = NOT_TOLD if device.temperature_c is None else f"{device.temperature_c} C"
    return (temperature, NOT_TOLD if device.power_w is None else f"{device.power_w} W")


def _is_simulated(report: AcceleratorReport) -> bool | None:
    """True if memory and utilization are simulated; None while no job says it."""
    if report.gpus:
        return False
    return None if report.status is None else report.status.simulated


def _in_table(command: str) -> str:
    """A command line for a table, shortened to the rest of the terminal's width."""
    width = max(shutil.get_terminal_size((PIPE_WIDTH, 24)).columns - REST_OF_TABLE, MIN_COMMAND_WIDTH)
    return in_one_line(command, width)


def _mib(amount: int | None) -> str:
    return "-" if amount is None else f"{amount} MiB"


def _percent(amount: int | None, unknown: str) -> str:
    return unknown if amount is None else f"{amount}%"
