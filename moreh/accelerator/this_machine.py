"""This machine as an accelerator: the GPUs that torch detects, with rates from devices.json.

It is the accelerator of an environment in which no flavor was chosen. Without a GPU there is no such accelerator.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from moreh.accelerator.devices import Device, device_of_driver
from moreh.accelerator.flavors import Flavor, all_flavors, find_flavor
from moreh.accelerator.gpus import Gpu, visible_gpus
from moreh.log import logger
from moreh.system import available_cores

# The name of this accelerator, of this machine as a device of `moreh-plan`, and of the class of efficiency that is
# measured on it.
THIS_MACHINE = "this machine"
# Its number in the list of models, before the flavors.
NUMBER = "0"
# Until a rate is measured. NaN, so that nothing can be planned with it by mistake.
NOT_MEASURED = math.nan


def this_machine() -> Flavor | None:
    """The accelerator of this machine's GPUs; None if torch sees no GPU."""
    gpus = visible_gpus()
    return Flavor(THIS_MACHINE, device_of(gpus), len(gpus), nodes=1, simulated=False) if gpus else None


def device_of(gpus: Sequence[Gpu]) -> Device:
    """The GPUs of a machine as one kind of device, the largest that all of them are.

    Memory and compute units are what the driver says. Rates and links are those of the entry of `devices.json` that the
    name matches: of the slowest one, where the GPUs differ. Without an entry for a name, rates are NaN until the
    planner measures them.
    """
    entries = [device_of_driver(gpu.name, gpu.compute_units) for gpu in gpus]
    known = [entry for entry in entries if entry is not None]
    name = " and ".join(dict.fromkeys(gpu.name for gpu in gpus))
    memory_mib = min(gpu.memory_mib for gpu in gpus)
    compute_units = min(gpu.compute_units for gpu in gpus)
    if len(known) < len(entries):
        return _unknown_device(name, memory_mib, compute_units, len(gpus))
    entry = min(known, key=lambda device: device.bf16_flops_per_second)
    has_whole_packages = len(gpus) % entry.devices_per_package == 0
    return replace(
        entry,
        name=name,
        memory_mib=memory_mib,
        compute_units=compute_units,
        devices_per_package=entry.devices_per_package if has_whole_packages else 1,
        package_bytes_per_second=entry.package_bytes_per_second if has_whole_packages else None,
        devices_per_node=len(gpus),
        source=f"rates and links of the device {entry.name!r}, memory and compute units of the driver",
    )


def machine_text(machine: Flavor) -> str:
    """The log line about this machine as the accelerator."""
    device = machine.device
    return f"This machine: {machine.devices} x {device.name}, {device.memory_mib} MiB each; {device.source}."


def log_devices(flavor: Flavor, *, on_cpu: bool) -> None:
    """Say on which devices the job computes and, if these are not those of the accelerator, that it is simulated."""
    if not flavor.simulated:
        logger.info(machine_text(flavor))
        return
    model = f"{flavor.name} ({flavor.devices} x {flavor.device.name}, {flavor.memory_mib} MiB)"
    if on_cpu:
        logger.info(
            "Simulated: this machine has no GPU, so %s is simulated and the job computes on %d CPU core(s).",
            model,
            available_cores(),
        )
    else:
        logger.info(
            "Simulated: %s was chosen, so its plans are predictions and the job computes on this machine's GPUs; "
            "'moreh-switch-model \"%s\"' plans for these.",
            model,
            THIS_MACHINE,
        )


def find_model(selection: str) -> Flavor:
    """The flavor with this name or number or, where torch sees a GPU, this machine by its name or its number.

    Raises:
        AcceleratorError: there is no such accelerator.
    """
    if selection.strip().lower() in (NUMBER, THIS_MACHINE):
        machine = this_machine()
        if machine is not None:
            return machine
    return find_flavor(selection)


def listed_models() -> dict[int, Flavor]:
    """Everything that `find_model` finds, by its number in the list of the tools."""
    machine = this_machine()
    listed = {} if machine is None else {int(NUMBER): machine}
    return listed | dict(enumerate(all_flavors(), start=1))


def _unknown_device(name: str, memory_mib: int, compute_units: int, devices: int) -> Device:
    return Device(
        name=name,
        memory_mib=memory_mib,
        bf16_flops_per_second=NOT_MEASURED,
        float32_flops_per_second=NOT_MEASURED,
        float8_flops_per_second=None,
        memory_bytes_per_second=NOT_MEASURED,
        compute_units=compute_units,
        devices_per_package=1,
        package_bytes_per_second=None,
        devices_per_node=devices,
        node_bytes_per_second=NOT_MEASURED,
        network_bytes_per_second=NOT_MEASURED,
        efficiency_class=THIS_MACHINE,
        source="no entry of devices.json has this name, so its rates are measured before the first plan and kept",
    )
