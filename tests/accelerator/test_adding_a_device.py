"""Kinds of devices and flavors are data: a new one is an entry of a file, and the planner plans for it."""

import json
import shutil
from pathlib import Path

import pytest

from moreh.accelerator import devices, flavors
from moreh.accelerator.devices import all_devices, find_device
from moreh.accelerator.flavors import all_flavors, find_flavor
from moreh.accelerator.registry import switch_model
from moreh.accelerator.this_machine import this_machine
from moreh.errors import AcceleratorError
from tests.helpers.fake_gpus import show_gpus
from tests.helpers.planner.plan_tool import STEP, runner, write_model

# A device that is not in the catalog, with the figures of one that is:
# https://www.amd.com/en/products/accelerators/instinct/mi350/mi355x.html
NAME = "MI555X"
MI355X = {
    "memory_mib": 294_896,
    "bf16_flops_per_second": 2.5e15,
    "float32_flops_per_second": 157.3e12,
    "float8_flops_per_second": 5.0e15,
    "memory_bytes_per_second": 8.0e12,
    "compute_units": 256,
    "devices_per_package": 1,
    "package_bytes_per_second": None,
    "devices_per_node": 8,
    "node_bytes_per_second": 537.6e9,
    "network_bytes_per_second": 50e9,
    "efficiency_class": "CDNA3",
    "driver_names": ["MI555X OAM"],
    "source": "AMD Instinct MI355X data sheet, "
    "https://www.amd.com/en/products/accelerators/instinct/mi350/mi355x.html (288 GB HBM3E, dense rates; 7 Infinity "
    "Fabric links of 76.8 GB/s a direction); usable memory, a network of 400 Gb/s a device and "
    "the efficiency of CDNA 3 assumed",
}
FLAVOR = {"name": "8xMI555X.2304GB", "device": "MI555X", "devices": 8, "nodes": 1}


@pytest.fixture
def edit_data(tmp_path, monkeypatch):
    """Changes a copy of the data files, which counts instead of them for one test."""
    shutil.copytree(Path(devices.__file__).parent / "data", tmp_path / "data")

    def clear():
        for cached in (all_devices, all_flavors, flavors.default_flavor):
            cached.cache_clear()

    def edit(name, change):
        path = tmp_path / "data" / name
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")
        clear()

    monkeypatch.setattr(devices, "_DATA", tmp_path / "data" / "devices.json")
    monkeypatch.setattr(flavors, "_DATA", tmp_path / "data" / "flavors.json")
    yield edit
    clear()


@pytest.fixture
def with_new_device(edit_data):
    """One more device, and one more flavor of it: an entry of a file each."""
    edit_data("devices.json", lambda table: table.update({NAME: MI355X}))
    edit_data("flavors.json", lambda table: table["flavors"].append(FLAVOR))


@pytest.mark.usefixtures("with_new_device")
def test_new_device_and_flavor_are_found():
    flavor = find_flavor("8xmi555x.2304gb")
    assert find_flavor(str(len(all_flavors()))) is flavor
    assert flavor.device is find_device("mi555x")
    assert flavor.memory_mib == 8 * 294_896
    assert find_flavor("xLarge.512GB").device.name == "MI250 GCD"


@pytest.mark.usefixtures("with_new_device")
def test_planner_plans_for_a_new_flavor(state_directory, monkeypatch, capsys, tmp_path):
    plan, model = runner(monkeypatch, capsys), write_model(tmp_path)

    def best(*arguments):
        # So much to compute that hosts, of which little is known, do not decide.
        code, out, err = plan(model, "--batch-size", "12288", "--sequence-length", "128", *arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)["plans"][0]

    switch_model("8xMI555X.2304GB")
    new, old = best(), best("--accelerator", "xLarge.512GB")
    assert new == best("--device", NAME, "--devices", "8")
    assert 0 < new["step_time_s"] < old["step_time_s"]
    assert best("--precision", "float8")["step_time_s"] < new["step_time_s"]
    code, out, err = plan(model, *STEP, "--flavors")
    assert (code, err) == (0, "")
    assert "8xMI555X.2304GB" in out
    assert "xLarge.512GB" not in out  # device-hours of other devices would be no measure


@pytest.mark.usefixtures("with_new_device", "state_directory")
@pytest.mark.parametrize("name", ["AMD Instinct MI555X OAM", "AMD Instinct MI555X"])
def test_gpus_of_a_new_device_have_its_rates(monkeypatch, name):
    show_gpus(monkeypatch, [name] * 2, compute_units=256)
    assert this_machine().device.bf16_flops_per_second == MI355X["bf16_flops_per_second"]


@pytest.mark.usefixtures("with_new_device")
def test_tools_offer_a_new_device(monkeypatch, capsys):
    code, out, _ = runner(monkeypatch, capsys)("--help")
    assert code == 0
    assert NAME in out


def test_flavor_of_an_unknown_device_is_refused(edit_data):
    edit_data("flavors.json", lambda table: table["flavors"].append({**FLAVOR, "device": "MI999"}))
    with pytest.raises(
        AcceleratorError, match=r"entry '8xMI555X\.2304GB': no device 'MI999': known devices are MI250 GCD, "
    ):
        all_flavors()


def change(**values):
    return lambda table: table["MI250 GCD"].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda table: table["MI250 GCD"].pop("compute_units"), "missing are compute_units; the keys are memory_mib, "),
        (change(tflops=3), "unknown are tflops; the keys are"),
        (change(memory_mib="64 GiB"), "memory_mib is '64 GiB'; expected a whole number from 1"),
        (change(devices_per_node=0), "devices_per_node is 0; expected a whole number from 1"),
        (change(bf16_flops_per_second=2500), r"bf16_flops_per_second is 2500; expected a number from 1e\+12 "),
        (change(float8_flops_per_second=True), r"float8_flops_per_second is True; expected .* or null"),
        (change(network_bytes_per_second=None), "network_bytes_per_second is None; expected a number from"),
        (change(package_bytes_per_second=None), "expected a rate where a package has several devices, else null"),
        (change(devices_per_node=7), "devices_per_node is 7; expected a multiple of devices_per_package, 2"),
        (change(source=""), "source is ''; expected a string"),
        (change(efficiency_assumed="yes"), "efficiency_assumed is 'yes'; expected true or false"),
        (change(driver_names="MI250"), "driver_names is 'MI250'; expected a list of strings"),
        (change(driver_names=["MI250", 3]), r"driver_names is \['MI250', 3\]; expected a list of strings"),
        (lambda table: table.update({"MI250 GCD": 3}), "3 is not an object"),
    ],
)
def test_wrong_entry_of_a_device_is_refused_by_its_key(edit_data, edit, message):
    edit_data("devices.json", edit)
    with pytest.raises(AcceleratorError, match=rf"^devices\.json, entry 'MI250 GCD': .*{message}"):
        all_devices()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"devices": 12}, "12 devices on 1 nodes; expected equally many on each node, at most 8 of MI555X"),
        ({"devices": 9, "nodes": 2}, "9 devices on 2 nodes"),
        ({"memory": 3}, "unknown are memory; the keys are name, device, devices, nodes"),
        ({"nodes": 0}, "nodes is 0; expected a whole number from 1"),
    ],
)
@pytest.mark.usefixtures("with_new_device")
def test_wrong_entry_of_a_flavor_is_refused_by_its_key(edit_data, values, message):
    edit_data("flavors.json", lambda table: table["flavors"][-1].update(values))
    with pytest.raises(AcceleratorError, match=rf"^flavors\.json, entry '8xMI555X\.2304GB': {message}"):
        all_flavors()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "A": {},\n  "A": {}\n}', "devices.json: 'A' is there twice"),
        ('{\n  "A": {}\n  "B": {}\n}', "devices.json, line 3: Expecting ',' delimiter; correct the JSON there"),
    ],
)
def test_wrong_file_is_one_line_of_the_tools(edit_data, text, message, monkeypatch, capsys):
    devices._DATA.write_text(text, encoding="utf-8")
    all_devices.cache_clear()
    code, _, err = runner(monkeypatch, capsys)("--help")
    assert code != 0
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_device_given_as_an_accelerator_gets_a_hint():
    with pytest.raises(AcceleratorError, match="H200 is a device, for which moreh-plan has --device and --devices"):
        find_flavor("H200")


@pytest.mark.parametrize("name", all_devices())
def test_device_has_a_source_and_plausible_figures(name):
    device = find_device(name)
    assert device.source
    assert device.bf16_flops_per_second > device.float32_flops_per_second
    assert (device.devices_per_package > 1) == (device.package_bytes_per_second is not None)
    assert device.devices_per_node % device.devices_per_package == 0
    assert device.network_bytes_per_second < device.node_bytes_per_second < device.memory_bytes_per_second


@pytest.mark.parametrize("flavor", all_flavors(), ids=lambda flavor: flavor.name)
def test_flavor_fills_its_nodes(flavor):
    assert flavor.devices % flavor.nodes == 0
    assert flavor.devices // flavor.nodes <= flavor.device.devices_per_node
