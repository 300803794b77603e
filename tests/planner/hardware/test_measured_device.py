"""A measured profile as a device: the planner's formulas give the measured times back."""

import dataclasses

import numpy as np
import pytest

from moreh.planner.hardware.cluster import ring_links
from moreh.planner.hardware.measured_device import measured_cluster, ring_latency_and_rate
from tests.helpers.planner.synthetic_profile import MATMUL_SIZES, roofline_of, synthetic_profile


@pytest.mark.parametrize("compute", ["float32", "half"])
@pytest.mark.parametrize(("depth", "waves"), [(0.0, 0.0), (20.0, 0.5), (150.0, 0.1), (5.0, 2.0)])
def test_measured_matmuls_are_given_back(compute, depth, waves):
    profile = synthetic_profile(depth=depth, waves=waves)
    roofline = roofline_of(profile, compute)
    matmuls = [matmul for matmul in profile.matmuls if matmul.compute == compute]
    assert len(matmuls) == len(MATMUL_SIZES)
    for matmul in matmuls:
        predicted = roofline.matmul_s(matmul.rows, matmul.outer, matmul.inner)
        assert predicted == pytest.approx(matmul.seconds, rel=0.1)
    # A fraction of the highest measured rate, which the largest of these sizes nearly reaches.
    assert 0.8 < roofline.efficiency.matmul < 1.3


def test_measured_attention_memory_and_kernel_launches_are_given_back():
    profile = synthetic_profile()
    for compute, rate in (("float32", 5e10), ("half", 6e10)):
        roofline = roofline_of(profile, compute)
        assert roofline.attention_s(1e9) == pytest.approx(1e9 / rate + 5e-6)
        assert roofline.memory_s(1e9) == pytest.approx(1e9 / 5e10 + 5e-6)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_measured_collectives_are_given_back(workers):
    profile = synthetic_profile(workers)
    cluster = measured_cluster(profile)
    assert (cluster.devices, cluster.devices_per_node, cluster.nodes) == (workers, workers, 1)
    links = ring_links(cluster, np.array([workers]), np.array([1]))
    ring_s = roofline_of(profile, "float32").ring_s
    assert profile.collectives
    for collective in profile.collectives:
        rings = 2 if collective.operation == "all-reduce" else 1
        assert rings * ring_s(collective.size_bytes, links)[0] == pytest.approx(collective.seconds, rel=0.05)


def test_noisy_collectives_still_give_positive_constants():
    profile = synthetic_profile(2)
    # The larger the faster: no latency and rate explain that.
    noisy = [dataclasses.replace(c, seconds=1e-3 * (5 - i)) for i, c in enumerate(profile.collectives) if i < 5]
    latency_s, rate = ring_latency_and_rate(dataclasses.replace(profile, collectives=tuple(noisy)))
    assert latency_s >= 0
    assert rate > 0


def test_all_reduce_takes_as_many_rings_as_measured():
    profile = synthetic_profile(4)
    halved = tuple(
        dataclasses.replace(c, seconds=0.6 * c.seconds) if c.operation == "all-reduce" else c
        for c in profile.collectives
    )
    profile = dataclasses.replace(profile, collectives=halved)
    cluster = measured_cluster(profile)
    assert cluster.all_reduce_rings == pytest.approx(1.2)
    links = ring_links(cluster, np.array([4]), np.array([1]))
    roofline = roofline_of(profile, "float32")
    for collective in halved:
        seconds = roofline.all_reduce_s if collective.operation == "all-reduce" else roofline.ring_s
        assert seconds(collective.size_bytes, links)[0] == pytest.approx(collective.seconds, rel=0.05)
