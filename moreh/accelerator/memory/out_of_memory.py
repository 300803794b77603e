"""Out-of-memory errors: simulated for simulated devices, predicted for this machine's GPUs."""

import torch

from moreh.accelerator.flavors import Flavor
from moreh.accelerator.registry_content import Accelerator
from moreh.errors import MorehError


class SimulatedOutOfMemoryError(torch.OutOfMemoryError, MorehError):
    """A job needs more memory than the simulated device has. `except torch.cuda.OutOfMemoryError` catches the error."""


class PredictedOutOfMemoryError(torch.OutOfMemoryError, MorehError):
    """No plan is predicted to fit this machine's GPUs. `except torch.cuda.OutOfMemoryError` catches it."""


def out_of_memory_error(
    *, what: str, requested_bytes: int, used_bytes: int, accelerator: Accelerator, all_devices: bool
) -> SimulatedOutOfMemoryError:
    """The error for `requested_bytes` more bytes of `what`, on one device or on all devices of the accelerator.

    `used_bytes` bytes are in use already.
    """
    flavor = accelerator.flavor
    memory_mib = flavor.memory_mib if all_devices else flavor.device.memory_mib
    available_bytes = max(memory_mib * 2**20 - used_bytes, 0)
    if all_devices:
        where = f"the {flavor.devices} device(s) of accelerator {accelerator.index} ({flavor.name}) have together"
        remedy = "Switch to a larger model with 'moreh-switch-model', or use a smaller batch."
    else:
        where = f"one device of accelerator {accelerator.index} ({flavor.device.name}) has"
        remedy = (
            "Call torch.moreh.option.enable_advanced_parallelization() before the model is loaded so that it may use "
            f"all {flavor.devices} device(s), switch to a larger model with 'moreh-switch-model' if these are too few, "
            "or use a smaller batch."
        )
    return SimulatedOutOfMemoryError(
        f"Error Code 4: OUT_OF_MEMORY (simulated). The accelerator is out of memory: requested {requested_bytes} bytes "
        f"for {what}; available are {available_bytes} bytes of the {memory_mib} MiB that {where}. {remedy}"
    )


def nothing_fits_error(
    smallest_bytes: float, memory_fraction: float, accelerator: Accelerator, flavor: Flavor
) -> SimulatedOutOfMemoryError | PredictedOutOfMemoryError:
    """The error for a training run without a plan that fits.

    The smallest plan needs `smallest_bytes` bytes on its fullest device. Plans may use the share `memory_fraction` of a
    device, from 0 to 1. `flavor` has the devices that were planned for, of the accelerator or, on this machine's GPUs,
    those of the workers.
    """
    available_bytes = round(flavor.device.memory_bytes * memory_fraction)
    if not flavor.simulated:
        return PredictedOutOfMemoryError(
            f"Error Code 4: OUT_OF_MEMORY (predicted). No plan fits {flavor.name} ({flavor.devices} x "
            f"{flavor.device.name}): the smallest one requested {round(smallest_bytes)} bytes on a GPU; available are "
            f"{available_bytes} bytes, {memory_fraction:.0%} of {flavor.device.memory_mib} MiB. Use more GPUs or a "
            "smaller batch, or let plans use more of a GPU with "
            "MOREH_ADVANCED_PARALLELIZATION_MEMORY_USAGE_CORRECTION_RATIO."
        )
    return SimulatedOutOfMemoryError(
        f"Error Code 4: OUT_OF_MEMORY (simulated). No plan fits accelerator {accelerator.index} ({flavor.name}): the "
        f"smallest one requested {round(smallest_bytes)} bytes on a device; available are {available_bytes} bytes, "
        f"{memory_fraction:.0%} of a {flavor.device.name}'s {flavor.device.memory_mib} MiB. Switch to a larger model "
        "with 'moreh-switch-model' ('moreh-plan --flavors' compares them), or use a smaller batch."
    )
