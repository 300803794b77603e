"""This machine's profile: what is measured, that it is kept, and that the planner's formulas give it back."""

import dataclasses
import json
import threading

import numpy as np
import pytest

from moreh.errors import PlanError
from moreh.planner.hardware import measured_device as lm
from moreh.planner.hardware.cluster import ring_links
from moreh.planner.hardware.microbenchmarks import CHAIN, Worker
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.software_profile import SoftwareProfile

IMPLEMENTATIONS = {
    "float32": SoftwareProfile("float32", compute="float32", activation_bytes=4),
    "half": SoftwareProfile("half"),
}
SIZES = [
    (512, 64, 512),
    (512, 512, 512),
    (256, 2048, 256),
    (32, 256, 256),
    (128, 256, 256),
    (256, 256, 256),
    (512, 256, 1024),
]


def synthetic_profile(workers=1, depth=20.0, waves=0.5, latency_s=2e-4, rate=2e9, rates=(1e11, 3e11)):
    """What would be measured on a machine with these constants."""
    products = [
        lm.MeasuredMatmul(
            compute,
            rows,
            inner,
            outer,
            seconds=2 * rows * inner * outer / peak * (1 + depth / inner) * (1 + waves * 32768 / (rows * outer)) + 5e-6,
        )
        for compute, peak in zip(("float32", "half"), rates, strict=True)
        for rows, inner, outer in SIZES
    ]
    share = (workers - 1) / workers
    collectives = [
        lm.MeasuredCollective(name, size, rings * ((workers - 1) * latency_s + share * size / rate))
        for size in (2**12, 2**20, 2**24)
        for name, rings in (("all-reduce", 2), ("all-gather", 1))
        if workers > 1
    ]
    return lm.LocalProfile(
        workers=workers,
        threads_per_worker=1,
        memory_mib=1024,
        compute_units=1,
        products=tuple(products),
        attention_float32_flops_per_second=5e10,
        attention_bf16_flops_per_second=6e10,
        memory_bytes_per_second=5e10,
        forward_operation_s=4e-6,
        autograd_operation_s=1e-5,
        collectives=tuple(collectives),
        contention=0.5,
        skew=0.1,
        confirmed=1.0,
    )


def roofline_of(profile, compute):
    return Roofline(lm.device_of(profile), lm.efficiency_of(profile, compute), IMPLEMENTATIONS[compute])


@pytest.mark.parametrize("compute", ["float32", "half"])
@pytest.mark.parametrize(("depth", "waves"), [(0.0, 0.0), (20.0, 0.5), (150.0, 0.1), (5.0, 2.0)])
def test_planner_gives_back_the_measured_products(compute, depth, waves):
    profile = synthetic_profile(depth=depth, waves=waves)
    roofline = roofline_of(profile, compute)
    products = [product for product in profile.products if product.compute == compute]
    assert len(products) == len(SIZES)
    for product in products:
        predicted = roofline.matmul_s(product.rows, product.outer, product.inner)
        assert predicted == pytest.approx(product.seconds, rel=0.1)
    # A fraction of the highest measured rate, which the largest of these sizes nearly reaches.
    assert 0.8 < roofline.efficiency.matmul < 1.3


def test_planner_gives_back_attention_memory_and_start_of_kernels():
    profile = synthetic_profile()
    for compute, rate in (("float32", 5e10), ("half", 6e10)):
        roofline = roofline_of(profile, compute)
        assert roofline.attention_s(1e9) == pytest.approx(1e9 / rate + 5e-6)
        assert roofline.memory_s(1e9) == pytest.approx(1e9 / 5e10 + 5e-6)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_planner_gives_back_the_measured_collectives(workers):
    profile = synthetic_profile(workers)
    cluster = lm.cluster_of(profile)
    assert (cluster.devices, cluster.devices_per_node, cluster.nodes) == (workers, workers, 1)
    links = ring_links(cluster, np.array([workers]), np.array([1]))
    ring_s = roofline_of(profile, "float32").ring_s
    assert profile.collectives
    for collective in profile.collectives:
        rings = 2 if collective.operation == "all-reduce" else 1
        assert rings * ring_s(collective.size_bytes, links)[0] == pytest.approx(collective.seconds, rel=0.05)


def test_collectives_in_disorder_still_give_positive_constants():
    profile = synthetic_profile(2)
    disorder = [dataclasses.replace(c, seconds=1e-3 * (5 - i)) for i, c in enumerate(profile.collectives) if i < 5]
    latency_s, rate = dataclasses.replace(profile, collectives=tuple(disorder)).ring
    assert latency_s >= 0
    assert rate > 0


def test_one_worker_measured_once_and_kept(state_directory, monkeypatch):
    profile = lm.local_profile()
    assert profile.workers == 1
    assert profile.collectives == ()
    assert {product.compute for product in profile.products} == {"float32", "half"}
    assert 1e8 < profile.best_rate("half") < 1e17
    assert 1e8 < profile.best_rate("float32") < 1e17
    assert 1e8 < profile.memory_bytes_per_second < 1e13
    assert 0 < profile.forward_operation_s < 0.1
    assert 0 < profile.autograd_operation_s < 0.1
    assert profile.memory_mib > 0
    for compute in ("float32", "half"):
        assert roofline_of(profile, compute).matmul_s(256, 256, 256) > 0

    (path,) = state_directory.glob("this-machine-*.json")
    with monkeypatch.context() as patched:
        patched.setattr(lm, "measure", lambda workers: pytest.fail("measured again"))
        assert lm.local_profile() == profile

    other = synthetic_profile()
    monkeypatch.setattr(lm, "measure", lambda workers: other)
    good = json.loads(path.read_text(encoding="utf-8"))
    outdated = good | {"key": good["key"] | {"torch": "1.0"}}
    partial = good | {"profile": {key: value for key, value in good["profile"].items() if key != "contention"}}
    negative = good | {"profile": good["profile"] | {"memory_bytes_per_second": -1.0}}
    for content in ("", "{", "[]", "null", '{"key": 1}', *(json.dumps(c) for c in (outdated, partial, negative))):
        path.write_text(content, encoding="utf-8")
        assert lm.local_profile() == other
        assert lm.local_profile() == other
        assert json.loads(path.read_text(encoding="utf-8"))["key"] == good["key"]


def test_forward_pass_takes_no_longer_than_with_its_backward_pass(monkeypatch, tmp_path):
    worker = Worker(0, 1, tmp_path / "rendezvous")
    measured = worker._one_pass()
    for forward_s, expected_s in ((0.1, 0.1), (0.9, 0.3)):  # of which the second was disturbed by another program
        one_pass = {**measured, ("forward",): forward_s, ("autograd",): 0.3}
        monkeypatch.setattr(worker, "_one_pass", lambda one_pass=one_pass: one_pass)
        figures = worker.measure()
        assert figures["forward_operation_s"] == pytest.approx(expected_s / CHAIN)
        assert figures["autograd_operation_s"] == pytest.approx(0.3 / CHAIN)


def test_another_number_of_threads_is_another_profile(state_directory, monkeypatch):
    measured = []
    monkeypatch.setattr(lm, "measure", lambda workers: measured.append(workers) or synthetic_profile(workers))
    monkeypatch.setattr(lm, "available_cores", lambda: 8)
    monkeypatch.setattr(lm.psutil, "cpu_count", lambda logical: 8)
    for limit, expected in ((None, 1), ("2", 2), ("4", 3), ("4", 3), ("16", 3), ("nonsense", 3)):
        if limit is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", limit)
        lm.local_profile(1)
        lm.local_profile(4)
        # Four workers have two of the eight cores each, whatever more a variable allows.
        assert len(measured) == expected + 1, limit


def test_processes_at_the_same_time_wait_for_one_measurement(state_directory, monkeypatch):
    measured = []
    begun, resume = threading.Event(), threading.Event()

    def slow(workers):
        measured.append(workers)
        begun.set()
        assert resume.wait(30)
        return synthetic_profile(workers)

    monkeypatch.setattr(lm, "measure", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(lm.local_profile(2))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    resume.set()
    for thread in threads:
        thread.join(30)
    assert measured == [2]
    assert found == [synthetic_profile(2)] * 3


def test_a_disturbed_measurement_is_said(state_directory, monkeypatch, caplog):
    monkeypatch.setattr(lm, "measure", lambda workers: dataclasses.replace(synthetic_profile(), confirmed=0.3))
    monkeypatch.setattr(lm.logger, "propagate", True)
    lm.local_profile()
    lm.local_profile()
    (path,) = state_directory.glob("this-machine-*.json")
    # pytest sees a record twice where the logger has a handler of its own by now.
    (message,) = {id(record): record.getMessage() for record in caplog.records}.values()
    assert message.endswith(f"delete {path}")


def test_two_workers_measured_together(state_directory):
    profile = lm.local_profile(2)
    assert profile.workers == 2
    assert {collective.operation for collective in profile.collectives} == {"all-reduce", "all-gather"}
    latency_s, rate = profile.ring
    assert 0 <= latency_s < 10
    assert 1e5 < rate < 1e13
    assert 0 <= profile.contention <= 1
    assert 0 <= profile.skew <= 1
    assert lm.device_of(profile).devices_per_node == 2
    assert list(state_directory.glob("this-machine-*.json"))


@pytest.mark.parametrize("workers", [0, -1])
@pytest.mark.parametrize("function", [lm.measure, lm.local_profile])
def test_no_workers(function, workers):
    with pytest.raises(PlanError, match=f"^workers={workers}: this machine can have 1 or more$"):
        function(workers)


def test_a_worker_that_fails_is_named_by_its_last_line(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho first\necho no memory left\nexit 3\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    with pytest.raises(PlanError, match=r"could not be measured with 2 workers: no memory left$"):
        lm.measure(2)
