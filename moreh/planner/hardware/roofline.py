"""Seconds of single operations on one device: a roofline model whose efficiency depends on the operation's shape."""

from dataclasses import dataclass

import numpy as np

from moreh.accelerator.devices import Device
from moreh.planner.hardware.cluster import RingLinks
from moreh.planner.hardware.efficiency import Efficiency
from moreh.planner.plan.arrays import FloatArray, IntArray
from moreh.planner.software_profile import SoftwareProfile

Number = IntArray | FloatArray | int | float

# The tile of the result that one compute unit works on at a time in large matmuls (cuBLAS, hipBLASLt, CUTLASS).
TILE_ELEMENTS = 128 * 256
# An operand of a matmul in float8 is read in half precision and written in float8. Its range comes from earlier steps.
# A matmul's operands are each used twice in a step, in both directions, so that half of it counts for each use.
FLOAT8_CAST_BYTES = 3 / 2
# How suddenly a layer becomes bound by its host as it gets smaller.
HOST_SHARPNESS = 6


@dataclass(frozen=True)
class Roofline:
    """The time model of one device with one program."""

    device: Device
    efficiency: Efficiency
    """Constants of the device's class."""
    software: SoftwareProfile

    @property
    def attention_peak(self) -> float:
        """Peak FLOP/s of attention's matmuls, which are never in float8."""
        if self.software.compute == "float32":
            return self.device.float32_flops_per_second
        return self.device.bf16_flops_per_second

    @property
    def half_rate(self) -> float:
        """FLOP/s that large matmuls reach, if they are not in float8."""
        return self.attention_peak * self.efficiency.matmul

    @property
    def float8_rate(self) -> float | None:
        """FLOP/s that large linear layers reach in float8; None if they are not in it."""
        peak = self.device.float8_flops_per_second
        return None if self.software.compute != "float8" or peak is None else peak * self.efficiency.float8

    @property
    def memory_rate(self) -> float:
        """Bytes/s that memory-bound kernels reach."""
        return self.device.memory_bytes_per_second * self.efficiency.memory

    def matmul_s(
        self, rows: Number, columns: Number, depth: Number, batch: Number = 1, *, float8: bool = True
    ) -> FloatArray:
        """Seconds of `batch` matmuls `[rows, depth] x [depth, columns]`, bound by either compute or memory.

        With `float8`, they are in float8 if the program's linear layers are, and their operands are converted first.
        """
        rows, columns, depth, batch = (np.asarray(value, dtype=np.float64) for value in (rows, columns, depth, batch))
        waves = batch * rows * columns / (TILE_ELEMENTS * self.device.compute_units)
        fraction = depth / (depth + self.efficiency.matmul_depth) * waves / (waves + self.efficiency.matmul_waves)
        float8_rate = self.float8_rate if float8 else None
        compute_s = 2 * batch * rows * columns * depth / ((float8_rate or self.half_rate) * fraction)
        moved_bytes = batch * (rows * depth + depth * columns + rows * columns) * self.software.activation_bytes
        seconds = np.maximum(compute_s, moved_bytes / self.memory_rate) + self.efficiency.kernel_s
        if float8_rate is None:
            return seconds
        return seconds + batch * (rows + columns) * depth * FLOAT8_CAST_BYTES / self.memory_rate

    def attention_s(self, flops: Number) -> FloatArray:
        """Seconds of a fused attention kernel that computes `flops`."""
        rate = self.attention_peak * self.efficiency.attention
        return np.asarray(flops / rate + self.efficiency.kernel_s, dtype=np.float64)

    def memory_s(self, moved_bytes: Number, kernels: Number = 1) -> FloatArray:
        """Seconds of memory-bound kernels that together read and write `moved_bytes`."""
        return np.asarray(moved_bytes / self.memory_rate + kernels * self.efficiency.kernel_s, dtype=np.float64)

    def host_wait_s(self, device_s: FloatArray) -> FloatArray:
        """Seconds that a device waits for the host while it has `device_s` of work in one pass of a layer."""
        host_s = self.efficiency.layer_host_s
        if host_s == 0:
            return np.zeros_like(device_s)
        # A maximum with rounded corner: a few kernels wait even where most of them do not.
        longer_s = np.maximum(device_s, host_s)
        ratio = np.minimum(device_s, host_s) / longer_s
        return longer_s * (1 + ratio**HOST_SHARPNESS) ** (1 / HOST_SHARPNESS) - device_s

    def ring_s(self, whole_bytes: Number, links: RingLinks, collectives: Number = 1) -> FloatArray:
        """Seconds of ring all-gathers or reduce-scatters whose whole tensors have `whole_bytes`; 0 in a group of one.

        `collectives` follow each other, and each of them has the latency of a ring.
        """
        inside_node = self.efficiency.node * links.share_of_node**self.efficiency.partial_node
        fraction = np.where(links.across_nodes, self.efficiency.network, inside_node)
        hop_s = np.where(links.across_nodes, self.efficiency.network_hop_s, self.efficiency.node_hop_s)
        share = (links.size - 1) / links.size
        seconds = share * whole_bytes / (links.bytes_per_second * fraction) + collectives * (links.size - 1) * hop_s
        return np.where(links.size > 1, seconds, 0.0)

    def all_reduce_s(self, whole_bytes: Number, links: RingLinks) -> FloatArray:
        """Seconds of all-reduces of tensors of `whole_bytes`; 0 in a group of one.

        On rings, each is a reduce-scatter, then an all-gather: Thakur et al. 2005,
        https://doi.org/10.1177/1094342005051521. Other implementations differ by a constant factor.
        """
        return links.all_reduce_rings * self.ring_s(whole_bytes, links)

    def overlapped_s(self, computation_s: FloatArray, communication_s: FloatArray) -> FloatArray:
        """Seconds of a computation and a communication that run at the same time and slow each other down."""
        longer_s = np.maximum(computation_s, communication_s)
        shorter_s = np.minimum(computation_s, communication_s)
        return longer_s + self.efficiency.contention * shorter_s
