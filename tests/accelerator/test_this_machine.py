"""Where torch sees GPUs, they are the accelerator: by their names, memory and number, unless a flavor was chosen."""

import json
import math

import pytest

from moreh.accelerator import gpus as gpus_module
from moreh.accelerator.devices import all_devices, device_of_driver, find_device
from moreh.accelerator.flavors import all_flavors
from moreh.accelerator.gpus import gpu_uses, visible_gpus
from moreh.accelerator.registry import add_accelerator, read_registry, switch_model
from moreh.accelerator.this_machine import find_model, machine_text, this_machine
from moreh.errors import AcceleratorError, RegistryError
from tests.helpers.fake_gpus import A100, A100_BYTES, show_gpus

pytestmark = pytest.mark.usefixtures("state_directory")


@pytest.mark.parametrize(
    ("driver_name", "compute_units", "device"),
    [
        ("NVIDIA A100-SXM4-40GB", 108, "A100 40GB"),
        ("A100-SXM4-40GB", 108, "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", 108, "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", 108, "A100 PCIe 80GB"),
        ("NVIDIA A100-PCIE-40GB", 108, "A100 PCIe 40GB"),
        ("NVIDIA H100 80GB HBM3", 132, "H100 80GB"),
        ("NVIDIA H100 PCIe", 114, "H100 PCIe"),
        ("NVIDIA H100 NVL", 132, "H100 NVL"),
        ("NVIDIA H200", 132, "H200"),
        ("NVIDIA H200 NVL", 132, "H200 NVL"),
        ("NVIDIA H20", 78, "H20"),
        ("NVIDIA H800", 132, "H800"),
        ("NVIDIA A800-SXM4-80GB", 108, "A800 80GB"),
        ("NVIDIA GH200 480GB", 132, "GH200 96GB"),
        ("NVIDIA B200", 148, "B200"),
        ("NVIDIA B300 SXM6 AC", 148, "B300"),
        ("NVIDIA GB200", 152, "GB200"),
        ("NVIDIA GB300", 152, "GB300"),
        ("NVIDIA GB10", 48, "GB10"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 188, "RTX PRO 6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 188, "RTX PRO 6000 Server"),
        ("NVIDIA RTX 6000 Ada Generation", 142, "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 2080 Ti", 68, "RTX 2080 Ti"),
        ("AMD Radeon RX 7900 XTX", 96, "RX 7900 XTX"),
        ("AMD Instinct MI325X", 304, "MI325X"),
        ("AMD Instinct MI355X", 256, "MI355X"),
        ("NVIDIA GeForce RTX 4090", 128, "RTX 4090"),
        ("NVIDIA L40S", 142, "L40S"),
        ("NVIDIA A10G", 80, "A10G"),
        ("NVIDIA A10", 72, "A10"),
        ("Tesla T4", 40, "T4"),
        ("Tesla V100-SXM2-32GB", 80, "V100 32GB"),
        ("AMD Instinct MI300X", 304, "MI300X"),
        ("AMD Instinct MI210", 104, "MI210"),
        ("AMD Instinct MI250X", 110, "MI250X GCD"),
        ("AMD Instinct MI250X/MI250", 104, "MI250 GCD"),
        ("AMD Instinct MI250X/MI250", 110, "MI250X GCD"),
    ],
)
def test_names_of_drivers_are_known(driver_name, compute_units, device):
    assert device_of_driver(driver_name, compute_units) is find_device(device)
    assert device_of_driver(driver_name.upper(), compute_units) is find_device(device)


@pytest.mark.parametrize(
    "name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A100", "NVIDIA RTX 4090 Laptop GPU", "A10", "NVIDIA", ""]
)
def test_other_names_are_no_known_device(name):
    known = device_of_driver(name, 108)
    assert known is (find_device("A10") if name == "A10" else None)


def test_no_name_means_two_devices_with_as_many_compute_units():
    for device in all_devices().values():
        for name in (device.name, *device.driver_names):
            same = [
                other.name
                for other in all_devices().values()
                if name in (other.name, *other.driver_names) and other.compute_units == device.compute_units
            ]
            assert same == [device.name]


def test_gpus_are_the_accelerator_that_nobody_chose(monkeypatch):
    assert this_machine() is None
    assert read_registry().accelerator(0).flavor.name == "xLarge.512GB"

    show_gpus(monkeypatch, [A100] * 8, compute_units=107)
    flavor = read_registry().accelerator(0).flavor
    assert (flavor.name, flavor.simulated, flavor.devices, flavor.nodes) == ("this machine", False, 8, 1)
    device, entry = flavor.device, find_device("A100 40GB")
    assert (device.name, device.memory_bytes, device.compute_units) == (A100, A100_BYTES, 107)
    assert device.bf16_flops_per_second == entry.bf16_flops_per_second
    assert device.node_bytes_per_second == entry.node_bytes_per_second
    assert device.efficiency_class == entry.efficiency_class
    assert machine_text(flavor).startswith(
        "This machine: 8 x NVIDIA A100-SXM4-40GB, 40536 MiB each; rates and links of"
    )


def test_memory_is_what_the_driver_says(monkeypatch):
    show_gpus(monkeypatch, [A100], total_bytes=30 * 2**30)
    assert this_machine().device.memory_bytes == 30 * 2**30


def test_flavor_is_used_once_chosen_until_this_machine_is(monkeypatch):
    show_gpus(monkeypatch, [A100] * 2)
    assert switch_model("Large.256GB").flavor.name == "Large.256GB"
    assert read_registry().accelerator(0).flavor.simulated
    assert switch_model("This Machine").flavor.name == "this machine"
    assert switch_model("xLarge.512GB").flavor.name == "xLarge.512GB"  # the default one can be chosen, too
    assert read_registry().accelerator(0).flavor.name == "xLarge.512GB"
    assert switch_model("0").flavor.name == "this machine"
    assert not read_registry().accelerator(0).flavor.simulated
    assert add_accelerator("1").flavor.name == "Small.64GB"
    assert add_accelerator("0").flavor.name == "this machine"


@pytest.mark.parametrize("selection", ["0", "this machine"])
def test_this_machine_is_no_model_without_gpus(selection):
    with pytest.raises(AcceleratorError, match="give a number from 1 to 13"):
        find_model(selection)
    with pytest.raises(AcceleratorError, match="give a number from 1 to 13"):
        switch_model(selection)


def test_registry_follows_the_gpus_that_torch_sees(monkeypatch):
    add_accelerator("2")  # writes the file, without GPUs
    with monkeypatch.context() as seen:
        show_gpus(seen, [A100])
        assert [a.flavor.name for a in read_registry().accelerators] == ["this machine", "Medium.128GB"]
    assert [a.flavor.name for a in read_registry().accelerators] == ["xLarge.512GB", "Medium.128GB"]


@pytest.mark.parametrize(("model", "expected"), [("xLarge.512GB", "this machine"), ("Large.256GB", "Large.256GB")])
def test_registry_of_older_versions(state_directory, monkeypatch, model, expected):
    rows = [{"index": 0, "model": model, "token": "a"}]
    write_registry(state_directory, rows)
    show_gpus(monkeypatch, [A100])
    assert read_registry().accelerator(0).flavor.name == expected


@pytest.mark.parametrize("chosen", [1, "yes", None])
def test_wrong_choice_is_a_damaged_registry(state_directory, chosen):
    write_registry(state_directory, [{"index": 0, "model": "Large.256GB", "token": "a", "chosen": chosen}])
    with pytest.raises(RegistryError, match=r"is damaged \(chosen is "):
        read_registry()


def write_registry(directory, rows):
    directory.mkdir(exist_ok=True)
    content = {"current": 0, "next_job_id": 1, "accelerators": rows, "jobs": []}
    (directory / "registry.json").write_text(json.dumps(content), encoding="utf-8")


def test_unknown_gpu_has_no_rates_and_says_so(monkeypatch):
    show_gpus(monkeypatch, ["NVIDIA Q7 Prototype"] * 2)
    flavor = this_machine()
    assert not flavor.device.has_rates
    assert math.isnan(flavor.device.memory_bytes_per_second)
    assert flavor.device.memory_bytes == A100_BYTES
    assert machine_text(flavor) == (
        "This machine: 2 x NVIDIA Q7 Prototype, 40536 MiB each; no entry of devices.json has this name, so its rates "
        "are measured before the first plan and kept."
    )


def test_different_gpus_count_as_the_slowest(monkeypatch):
    show_gpus(monkeypatch, [A100, "NVIDIA L40S", "NVIDIA L4"])
    flavor = this_machine()
    assert flavor.devices == 3
    assert flavor.device.name == "NVIDIA A100-SXM4-40GB and NVIDIA L40S and NVIDIA L4"
    assert flavor.device.bf16_flops_per_second == find_device("L4").bf16_flops_per_second
    show_gpus(monkeypatch, [A100, "NVIDIA Q7 Prototype"])
    assert not this_machine().device.has_rates


@pytest.mark.parametrize(("gcds", "per_package"), [(8, 2), (1, 1), (3, 1)])
def test_packages_are_whole(monkeypatch, gcds, per_package):
    show_gpus(monkeypatch, ["AMD Instinct MI250"] * gcds, compute_units=104)
    device = this_machine().device
    assert device.devices_per_package == per_package
    assert (device.package_bytes_per_second is None) == (per_package == 1)


def test_gpus_of_a_driver_that_torch_cannot_use_are_none(monkeypatch):
    show_gpus(monkeypatch, [A100])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert visible_gpus() == ()
    assert this_machine() is None


def test_torch_is_not_imported_without_a_driver(run_process, tmp_path):
    source = (
        "import sys\nfrom moreh.accelerator import gpus\ngpus.DRIVER_FILES = [sys.argv[1]]\n"
        "assert gpus.visible_gpus() == ()\nprint('torch' in sys.modules)"
    )
    (tmp_path / "nvidiactl").touch()
    for name, is_imported in (("missing", "False"), ("nvidiactl", "True")):
        finished = run_process("python", "-c", source, tmp_path / name)
        assert finished.stdout == f"{is_imported}\n", finished.stderr
    assert gpus_module.DRIVER_FILES


def test_use_is_what_the_driver_says(monkeypatch):
    show_gpus(monkeypatch, [A100] * 2, used_bytes=3 * 2**30 + 1)
    assert [(use.memory_used_mib, use.memory_total_mib) for use in gpu_uses()] == [(3073, 40_536)] * 2
    assert {(use.utilization_percent, use.temperature_c, use.power_w) for use in gpu_uses()} == {(None, None, None)}

    show_gpus(
        monkeypatch,
        [A100] * 2,
        device_memory_used=lambda index: 5 * 2**30,
        utilization=lambda index: 40 + index,
        temperature=lambda index: 60,
        power_draw=lambda index: 301_499,
    )
    first, second = gpu_uses()
    assert (first.memory_used_mib, first.utilization_percent, first.temperature_c, first.power_w) == (5120, 40, 60, 301)
    assert second.utilization_percent == 41


def test_list_of_models_begins_with_this_machine(monkeypatch):
    assert find_model("1") is all_flavors()[0]
    show_gpus(monkeypatch, [A100])
    assert find_model("1") is all_flavors()[0]
    assert find_model("0").name == "this machine"
