"""The options of moreh-plan that say where to train."""

import argparse
from pathlib import Path

from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.cli.cluster_file import KEYS
from moreh.cli.terminal import amount, whole

# More than any cluster has, so that a typing error does not keep the search busy for minutes.
MAX_DEVICES, MAX_GBIT = 100_000, 1e6
# Of these options only one can say where to train.
_PLACES = ("--device", "--accelerator", "--this-machine", "--cluster", "--flavors")


def add_place(group: argparse._ArgumentGroup) -> None:
    """Add the options that say where to train."""
    group.add_argument(
        "--accelerator", metavar="MODEL", help="An accelerator, by its name or number in moreh-switch-model."
    )
    group.add_argument(
        "--device", metavar="NAME", help="A kind of device instead of an accelerator: one of those listed below."
    )
    group.add_argument(
        "--devices",
        type=whole(MAX_DEVICES),
        metavar="N",
        help=f"The number of these devices (with --device '{THIS_MACHINE}': of worker processes).",
    )
    group.add_argument(
        "--this-machine",
        action="store_true",
        help="The GPUs of this machine, as the driver reports them; with --devices, N such GPUs on nodes like it.",
    )
    group.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help=f"The cluster that a YAML file describes, with the keys {', '.join(KEYS)}.",
    )
    group.add_argument(
        "--devices-per-node",
        type=whole(MAX_DEVICES),
        metavar="N",
        help="The devices of each node, where they are not as many as usual.",
    )
    group.add_argument(
        "--network-gbit-per-device",
        type=amount(MAX_GBIT),
        metavar="G",
        help="The network between nodes: the Gbit/s of each device, in one direction, where they are not as usual.",
    )


def needs_of_place(options: argparse.Namespace) -> dict[str, bool]:
    """What the options that say where to train need of each other, as messages; True where it is met."""
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
    for index, place in enumerate(_PLACES):
        for other in _PLACES[index + 1 :]:
            if {place, other} != {"--accelerator", "--flavors"}:
                needs[f"{place} cannot be combined with {other}"] = not (given[place] and given[other])
    for name in ("--devices-per-node", "--network-gbit-per-device"):
        value = getattr(options, name.removeprefix("--").replace("-", "_"))
        needs[f"{name} cannot be combined with --flavors"] = value is None or not options.flavors
    return needs
