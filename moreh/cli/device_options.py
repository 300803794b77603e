"""Options of moreh-plan for the accelerator, the devices or the cluster."""

import argparse
from pathlib import Path

from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.cli.cluster_file import KEYS
from moreh.cli.terminal import positive_number, whole_number

# Above any real cluster, so that a typo does not keep the search busy for minutes.
MAX_DEVICES, MAX_GBIT = 100_000, 1e6
# These options exclude each other.
_EXCLUSIVE = ("--device", "--accelerator", "--this-machine", "--cluster", "--flavors")


def add_device_options(group: argparse._ArgumentGroup) -> None:
    """Add the options for the accelerator, the devices or the cluster."""
    group.add_argument(
        "--accelerator", metavar="MODEL", help="An accelerator, by name or number as in moreh-switch-model."
    )
    group.add_argument(
        "--device", metavar="NAME", help="A kind of device instead of an accelerator, from the list below."
    )
    group.add_argument(
        "--devices",
        type=whole_number(MAX_DEVICES),
        metavar="N",
        help=f"The number of these devices (with --device '{THIS_MACHINE}': of worker processes).",
    )
    group.add_argument(
        "--this-machine",
        action="store_true",
        help="The GPUs of this machine; with --devices, N such GPUs on nodes like this machine.",
    )
    group.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help=f"A YAML file that describes the cluster, with the keys {', '.join(KEYS)}.",
    )
    group.add_argument(
        "--devices-per-node",
        type=whole_number(MAX_DEVICES),
        metavar="N",
        help="Devices per node (default: that of the device).",
    )
    group.add_argument(
        "--network-gbit-per-device",
        type=positive_number(MAX_GBIT),
        metavar="G",
        help="Network from one device to other nodes, in Gbit/s in one direction (default: that of the device).",
    )


def device_option_requirements(options: argparse.Namespace) -> dict[str, bool]:
    """Requirements among these options: for each error message, whether its requirement is met."""
    given = {
        "--device": options.device is not None,
        "--accelerator": options.accelerator is not None,
        "--this-machine": options.this_machine,
        "--cluster": options.cluster is not None,
        "--flavors": options.flavors,
    }
    needs = {
        "--device and --devices are given together": options.this_machine
        or (options.device is None) == (options.devices is None)
    }
    for index, option in enumerate(_EXCLUSIVE):
        for other in _EXCLUSIVE[index + 1 :]:
            if {option, other} != {"--accelerator", "--flavors"}:
                needs[f"{option} cannot be combined with {other}"] = not (given[option] and given[other])
    for name in ("--devices-per-node", "--network-gbit-per-device"):
        value = getattr(options, name.removeprefix("--").replace("-", "_"))
        needs[f"{name} cannot be combined with --flavors"] = value is None or not options.flavors
    return needs
