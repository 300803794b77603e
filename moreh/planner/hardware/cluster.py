"""The devices that a plan runs on, and how fast a group of them can exchange data."""

from dataclasses import dataclass, replace

import numpy as np

from moreh.accelerator.devices import Device
from moreh.accelerator.flavors import Flavor
from moreh.planner.plan.arrays import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Cluster:
    """`devices` of one kind, numbered so that neighbours share a package, then a node of `devices_per_node`."""

    device: Device
    devices: int
    devices_per_node: int

    @property
    def nodes(self) -> int:
        """Nodes in use, the last one perhaps in part."""
        return -(-self.devices // self.devices_per_node)


def cluster_for_flavor(flavor: Flavor) -> Cluster:
    """The devices of an accelerator."""
    return Cluster(flavor.device, flavor.devices, flavor.devices // flavor.nodes)


def cluster_for_devices(device: Device, devices: int, network_bytes_per_second: float | None = None) -> Cluster:
    """`devices` of one kind in nodes of the usual size, with another network where one is given (bytes/s of a device)."""
    if network_bytes_per_second is not None:
        device = replace(device, network_bytes_per_second=network_bytes_per_second)
    return Cluster(device, devices, min(devices, device.devices_per_node))


@dataclass(frozen=True)
class RingLinks:
    """The slowest link that a ring over each group crosses: its rate for one device, the ring's size, and its level.

    `bytes_per_second` is the peak that one ring gets while all groups of the same kind communicate at once.
    `across_nodes` says whether the ring leaves a node; `share_of_node` is the part of a node's devices that take part in it.
    """

    size: IntArray
    bytes_per_second: FloatArray
    across_nodes: BoolArray
    share_of_node: FloatArray


def ring_links(cluster: Cluster, size: IntArray, stride: IntArray) -> RingLinks:
    """The links of rings over `size` devices that are `stride` apart, [n] each.

    A ring over several nodes uses the network ports of all its devices in a node: `size` = 16 with `stride` 1 on nodes of 8
    has 8 ports each way, with `stride` 8 only one, since the other 7 belong to the 7 other groups.
    """
    device = cluster.device
    node = cluster.devices_per_node
    span = size * stride
    # Groups follow each other without gaps: where their span does not divide a node, some of them cross its border.
    inside_node = (span <= node) & ((node % span == 0) | (cluster.devices <= node))
    members_in_node = np.maximum(1, np.gcd(node, span) // stride)
    network = device.network_bytes_per_second * np.minimum(members_in_node, size)
    rate = np.where(inside_node, device.node_bytes_per_second, np.minimum(network, device.node_bytes_per_second))
    rate = np.where(~inside_node & (members_in_node == 1), device.network_bytes_per_second, rate)
    if device.package_bytes_per_second is not None:
        inside_package = (span <= device.devices_per_package) & (device.devices_per_package % span == 0)
        rate = np.where(inside_package, device.package_bytes_per_second, rate)
    return RingLinks(size, rate, ~inside_node, np.minimum(1.0, size / node))
