"""Reads the YAML file that describes a cluster for `moreh-plan --cluster`."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moreh.errors import PlanError
from moreh.options import did_you_mean

# More of anything is a typing error.
MAX_COUNT, MAX_RATE = 100_000, 1e6


@dataclass(frozen=True)
class ClusterFile:
    """A cluster in the user's words. None: the usual value for the device."""

    device: str
    """A kind of device of `moreh-plan --help`, or "this machine" for one like the GPUs of this machine."""
    devices_per_node: int | None = None
    """Devices of each node."""
    nodes: int = 1
    """Nodes of the cluster."""
    node_gbyte_per_device: float | None = None
    """Link of a device to the others of its node: GB/s in one direction."""
    network_gbit_per_device: float | None = None
    """Link of a device to other nodes: Gbit/s in one direction."""
    network_gbit_per_node: float | None = None
    """Link of a whole node to other nodes, which its devices share, instead: Gbit/s in one direction."""
    nodes_per_switch: int | None = None
    """Nodes that one switch joins at the full rate; None for all."""
    oversubscription: float | None = None
    """The oversubscription of the network between switches: 3 for a network of 3:1."""


KEYS = tuple(field.name for field in fields(ClusterFile))


def read_cluster_file(path: Path) -> ClusterFile:
    """The cluster that a file describes.

    Raises:
        PlanError: the file cannot be read, or one of its keys or values is not allowed; one line names the first.
    """
    import yaml  # no other tool needs it

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PlanError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a character beyond Unicode
        raise PlanError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise PlanError(f"{path}: give keys such as 'device: H200', of {', '.join(KEYS)}")
    values: dict[str, Any] = {}
    for line, key, value in _entries(root):
        where = f"{path}:{line}: {key}"
        if key not in KEYS:
            raise PlanError(f"{where}: unknown key{did_you_mean(key, KEYS) or '.'} The keys are {', '.join(KEYS)}")
        if key in values:
            raise PlanError(f"{where} is given twice: remove one")
        values[key] = _read_value(where, key, value)
    if "device" not in values:
        raise PlanError(f"{path}: device is missing: give a kind of device that 'moreh-plan --help' lists")
    _check_network(path, values)
    return ClusterFile(**values)


def _check_network(path: Path, values: dict[str, Any]) -> None:
    if "network_gbit_per_device" in values and "network_gbit_per_node" in values:
        raise PlanError(f"{path}: network_gbit_per_node and network_gbit_per_device say the same: give one")
    if ("nodes_per_switch" in values) != ("oversubscription" in values):
        raise PlanError(
            f"{path}: nodes_per_switch and oversubscription belong together: give both, or none for a network in which "
            "all nodes have their full rate"
        )
    if values.get("oversubscription", 1) < 1:
        raise PlanError(
            f"{path}: oversubscription is {values['oversubscription']:g}: give at least 1, such as 2 for 2:1"
        )


def _entries(root: Any) -> Iterator[tuple[int, str, Any]]:
    """The line, the key and the value's node of each entry."""
    for key, value in root.value:
        yield key.start_mark.line + 1, str(key.value), value


def _read_value(where: str, key: str, node: Any) -> str | int | float:
    """The value of a key, read by the type of its field: YAML itself would take 010 for eight.

    Raises:
        PlanError: the value has another type, or is out of range.
    """
    # Anything but a scalar has a list of nodes here.
    text = node.value if isinstance(node.value, str) else "several values"
    is_plain = isinstance(node.value, str) and node.style is None
    if key == "device":
        if not isinstance(node.value, str) or not text.strip():
            raise PlanError(f"{where} is {text!r}: give the name of a kind of device that 'moreh-plan --help' lists")
        return text
    if key in ("devices_per_node", "nodes", "nodes_per_switch"):
        if is_plain and text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_COUNT:
            return int(text)
        raise PlanError(f"{where} is {text!r}: give a whole number from 1 to {MAX_COUNT:,}")
    rate = _number(text) if is_plain else None
    if rate is None or not 0 < rate <= MAX_RATE:
        raise PlanError(f"{where} is {text!r}: give a number above 0, at most {MAX_RATE:g}")
    return rate


def _number(text: str) -> float | None:
    """A number, which a NaN is not; None for other texts."""
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None
