"""The devices of a plan, and the bandwidth of a group of them."""

from dataclasses import dataclass, replace

import numpy as np

from moreh.accelerator.devices import Device
from moreh.accelerator.flavors import Flavor
from moreh.errors import PlanError
from moreh.planner.plan.arrays import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind, numbered so that neighbors share a package, then a node."""

    device: Device
    """The kind of device."""
    devices: int
    """Devices in use."""
    devices_per_node: int
    nodes_per_switch: int | None = None
    """Nodes that one switch joins at the full rate of the network; None for all."""
    oversubscription: float = 1.0
    """The oversubscription of a device's network towards nodes at other switches."""
    all_reduce_rings: float = 2.0
    """Rings of an all-gather that an all-reduce of as many bytes takes as long as."""
    concurrent_devices: float | None = None
    """Devices that can compute at the same time: on a CPU, the workers that its cores suffice for. None for all."""

    @property
    def devices_per_core(self) -> float:
        """Number of devices that share the computing resources of one device; 1 if each has its own."""
        return 1.0 if self.concurrent_devices is None else max(1.0, self.devices / self.concurrent_devices)

    @property
    def nodes(self) -> int:
        """Nodes in use. The last one may be used in part."""
        return -(-self.devices // self.devices_per_node)

    def network_rate(self, span: IntArray) -> FloatArray:
        """Peak bytes/s of one device to other nodes, for groups that each reach over `span` neighboring devices."""
        rate = np.full(np.shape(span), self.device.network_bytes_per_second)
        if self.nodes_per_switch is None:
            return rate
        switch = self.nodes_per_switch * self.devices_per_node
        inside = (span <= switch) & (switch % np.maximum(span, 1) == 0)
        return np.where(inside, rate, rate / self.oversubscription)


def cluster_for_flavor(flavor: Flavor) -> Cluster:
    """The devices of an accelerator."""
    return Cluster(flavor.device, flavor.devices, flavor.devices // flavor.nodes)


def cluster_for_devices(device: Device, devices: int, network_bytes_per_second: float | None = None) -> Cluster:
    """`devices` of one kind in nodes of their usual size.

    Args:
        network_bytes_per_second: Bytes/s of one device to other nodes; None for the kind's usual network.
    """
    if network_bytes_per_second is not None:
        device = replace(device, network_bytes_per_second=network_bytes_per_second)
    return Cluster(device, devices, min(devices, device.devices_per_node))


@dataclass(frozen=True)
class StatedLinks:
    """A user's description of a cluster, which overrides the facts of its kind of device. None: not described."""

    devices_per_node: int | None = None
    node_bytes_per_second: float | None = None
    """Link of one device to the others of its node, in one direction."""
    network_bytes_per_second: float | None = None
    """Link of one device to other nodes, in one direction."""
    node_network_bytes_per_second: float | None = None
    """Link of a whole node to other nodes, which its devices share."""
    nodes_per_switch: int | None = None
    """Nodes that one switch joins at the full rate."""
    oversubscription: float | None = None
    """The oversubscription of the network towards other switches."""

    def __bool__(self) -> bool:
        return self != StatedLinks()

    def changed(self, device: Device) -> Device:
        """A kind of device with these links.

        Raises:
            PlanError: packages of devices would be cut by the border of a node.
        """
        per_node = self.devices_per_node or device.devices_per_node
        if per_node % device.devices_per_package:
            raise PlanError(
                f"{per_node} devices on each node: {device.name} comes in packages of {device.devices_per_package}; "
                "give a multiple of that"
            )
        node_rate = self.node_bytes_per_second or device.node_bytes_per_second
        network_rate = self.network_bytes_per_second or device.network_bytes_per_second
        if self.node_network_bytes_per_second is not None:
            network_rate = self.node_network_bytes_per_second / per_node
        return replace(
            device,
            devices_per_node=per_node,
            node_bytes_per_second=node_rate,
            network_bytes_per_second=network_rate,
        )


@dataclass(frozen=True)
class RingLinks:
    """The slowest link that a ring over each group of a plan crosses, [n] each."""

    size: IntArray
    """Devices in the ring."""
    bytes_per_second: FloatArray
    """Peak rate of one ring while all groups of the same kind communicate at once."""
    across_nodes: BoolArray
    """True if the ring leaves a node."""
    share_of_node: FloatArray
    """The share of a node's devices that are in the ring (0 to 1)."""
    all_reduce_rings: float
    """The cluster's `all_reduce_rings`."""


def ring_links(cluster: Cluster, size: IntArray, stride: IntArray) -> RingLinks:
    """The links of rings over `size` devices that are `stride` apart, [n] each.

    A ring over several nodes uses the network ports of all its devices in a node. On nodes of 8, rings of 16 with
    stride 1 have 8 ports each way. Rings with stride 8 have one, since the other 7 ports belong to the 7 other groups.
    """
    device = cluster.device
    node = cluster.devices_per_node
    span = size * stride
    # Groups follow each other without gaps: where their span does not divide a node, some of them cross its border.
    inside_node = (span <= node) & ((node % span == 0) | (cluster.devices <= node))
    members_in_node = np.maximum(1, np.gcd(node, span) // stride)
    one_port = cluster.network_rate(span)
    network_rate = one_port * np.minimum(members_in_node, size)
    rate = np.where(inside_node, device.node_bytes_per_second, np.minimum(network_rate, device.node_bytes_per_second))
    rate = np.where(~inside_node & (members_in_node == 1), one_port, rate)
    if device.package_bytes_per_second is not None:
        inside_package = (span <= device.devices_per_package) & (device.devices_per_package % span == 0)
        rate = np.where(inside_package, device.package_bytes_per_second, rate)
    return RingLinks(size, rate, ~inside_node, np.minimum(1.0, size / node), cluster.all_reduce_rings)
