"""Seconds of single operations on one device, by a roofline with an efficiency that depends on their shape."""

from dataclasses import dataclass

import numpy as np

from moreh.accelerator.devices import Device
from moreh.planner.hardware.cluster import RingLinks
from moreh.planner.hardware.efficiency import Efficiency
from moreh.planner.plan.arrays import FloatArray, IntArray
from moreh.planner.software_profile import SoftwareProfile

Number = IntArray | FloatArray | int | float

# The tile of the result that one compute unit works on at a time in large matrix products (cuBLAS, hipBLASLt, CUTLASS).
TILE_ELEMENTS = 128 * 256


@dataclass(frozen=True)
class Roofline:
    """A device with its efficiency, for one software."""

    device: Device
    efficiency: Efficiency
    software: SoftwareProfile

    @property
    def half_rate(self) -> float:
        """FLOP/s that attention's products can reach at best."""
        if self.software.compute == "float32":
            return self.device.float32_flops_per_second
        return self.device.bf16_flops_per_second

    @property
    def linear_rate(self) -> float:
        """FLOP/s that linear layers reach when they are large."""
        float8 = self.device.float8_flops_per_second
        if self.software.compute == "float8" and float8 is not None:
            return float8 * self.efficiency.float8
        return self.half_rate * self.efficiency.matmul

    @property
    def memory_rate(self) -> float:
        """Bytes/s that memory-bound kernels reach."""
        return self.device.memory_bytes_per_second * self.efficiency.memory

    def matmul_s(self, rows: Number, columns: Number, depth: Number, batch: Number = 1) -> FloatArray:
        """Seconds of `batch` products `[rows, depth] x [depth, columns]`, by compute or by memory, whichever is slower."""
        rows, columns, depth, batch = (np.asarray(value, dtype=np.float64) for value in (rows, columns, depth, batch))
        waves = batch * rows * columns / (TILE_ELEMENTS * self.device.compute_units)
        fraction = depth / (depth + self.efficiency.matmul_depth) * waves / (waves + self.efficiency.matmul_waves)
        compute = 2 * batch * rows * columns * depth / (self.linear_rate * fraction)
        moved = batch * (rows * depth + depth * columns + rows * columns) * self.software.activation_bytes
        return np.maximum(compute, moved / self.memory_rate) + self.efficiency.kernel_s

    def attention_s(self, flops: Number) -> FloatArray:
        """Seconds of a fused attention kernel that computes `flops`."""
        return np.asarray(
            flops / (self.half_rate * self.efficiency.attention) + self.efficiency.kernel_s, dtype=np.float64
        )

    def memory_s(self, moved_bytes: Number, kernels: Number = 1) -> FloatArray:
        """Seconds of memory-bound kernels that read and write `moved_bytes` together."""
        return np.asarray(moved_bytes / self.memory_rate + kernels * self.efficiency.kernel_s, dtype=np.float64)

    def ring_s(self, whole_bytes: Number, links: RingLinks) -> FloatArray:
        """Seconds of an all-gather or a reduce-scatter of `whole_bytes` by a ring; 0 in a group of one.

        An all-reduce is both, one after the other: Thakur et al. 2005, https://doi.org/10.1177/1094342005051521.
        """
        inside = self.efficiency.node * links.share_of_node**self.efficiency.partial_node
        fraction = np.where(links.across_nodes, self.efficiency.network, inside)
        hop = np.where(links.across_nodes, self.efficiency.network_hop_s, self.efficiency.node_hop_s)
        share = (links.size - 1) / links.size
        return np.where(
            links.size > 1, share * whole_bytes / (links.bytes_per_second * fraction) + (links.size - 1) * hop, 0.0
        )

    def overlapped_s(self, computation: FloatArray, communication: FloatArray) -> FloatArray:
        """Seconds of a computation and a communication that run at the same time and slow each other down."""
        longer, shorter = np.maximum(computation, communication), np.minimum(computation, communication)
        return longer + self.efficiency.contention * shorter
