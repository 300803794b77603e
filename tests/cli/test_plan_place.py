"""moreh-plan for this machine's GPUs, and for clusters as users describe them."""

import json
from dataclasses import replace

import pytest

from moreh.accelerator.devices import find_device
from moreh.accelerator.registry import switch_model
from moreh.planner.hardware import environment as environment_module
from tests.helpers.fake_gpus import A100, show_gpus
from tests.helpers.planner.plan_tool import STEP
from tests.helpers.planner.synthetic_profile import synthetic_profile

LLAMA_8B = ("configs/models/llama3_8b.json", "--batch-size", "16", "--sequence-length", "2048")


def test_eight_a100_get_a_plan_that_fits(plan_json, plan, monkeypatch):
    show_gpus(monkeypatch, [A100] * 8)
    content = plan_json(*LLAMA_8B)
    assert content["accelerator"]["name"] == "this machine"
    assert (content["accelerator"]["device"], content["accelerator"]["devices"]) == (A100, 8)
    usable_bytes = 0.8 * 40_536 * 2**20
    assert content["limit_bytes"] == pytest.approx(usable_bytes)
    assert len(content["plans"]) == 10
    assert all(0 < best["memory_bytes"] <= usable_bytes for best in content["plans"])
    assert plan_json(*LLAMA_8B, "--this-machine")["plans"] == content["plans"]

    _, text, _ = plan(*LLAMA_8B)
    assert "Accelerator   this machine (8 x NVIDIA A100-SXM4-40GB) on 1 node\n" in text
    assert "Device        rates and links of the device 'A100 40GB', memory and compute units of the driver\n" in text
    assert "39.6 GiB per device, of which plans may use 80%: 31.7 GiB\n" in text
    assert "imulated" not in text


def test_this_machine_wins_over_a_chosen_accelerator(plan_json, model, monkeypatch):
    show_gpus(monkeypatch, [A100] * 2)
    switch_model("Large.256GB")
    assert plan_json(model, *STEP)["accelerator"]["name"] == "Large.256GB"
    for place in (("--this-machine",), ("--accelerator", "this machine")):
        assert plan_json(model, *STEP, *place)["accelerator"]["device"] == A100


def test_more_devices_than_this_machine_has(plan_json, model, monkeypatch):
    show_gpus(monkeypatch, [A100] * 4)
    accelerator = plan_json(model, *STEP, "--this-machine", "--devices", "12")["accelerator"]
    assert accelerator["name"] is None
    assert (accelerator["device"], accelerator["devices"], accelerator["nodes"]) == (A100, 12, 3)


def test_machine_without_gpus_is_refused(plan, model):
    code, _, err = plan(model, *STEP, "--this-machine")
    assert code == 1
    assert err == (
        "error: torch sees no GPU on this machine: --device 'this machine' --devices N plans for N worker processes on "
        "its CPU\n"
    )


def test_flavors_are_compared_where_this_machine_is_the_accelerator(plan_json, plan, model, monkeypatch):
    expected = plan_json(model, *STEP, "--flavors")["flavors"]
    show_gpus(monkeypatch, [A100])
    compared = plan_json(model, *STEP, "--flavors")["flavors"]
    assert [row["name"] for row in compared] == [row["name"] for row in expected]


def test_what_does_not_fit_gets_more_of_these_gpus(plan, monkeypatch):
    show_gpus(monkeypatch, [A100] * 2)
    code, _, err = plan(*LLAMA_8B)
    assert code == 1
    assert "take 8 x NVIDIA A100-SXM4-40GB, the smallest on which one fits, or give" in err


def test_rates_of_an_unknown_gpu_are_measured(plan_json, plan, model, monkeypatch):
    show_gpus(monkeypatch, ["NVIDIA Q7 Prototype"] * 4)
    asked = []

    def measured(workers):
        asked.append(workers)
        return replace(synthetic_profile(workers), memory_mib=7)

    monkeypatch.setattr(environment_module, "local_profile", measured)
    content = plan_json(model, *STEP, "--this-machine")
    assert asked == [4]
    assert content["accelerator"]["device"] == "NVIDIA Q7 Prototype"
    assert content["accelerator"]["device_memory_bytes"] == 40_536 * 2**20
    assert content["uncertainty"] == (
        "No entry of devices.json has the name NVIDIA Q7 Prototype. All figures are predictions from rates measured on "
        "this machine."
    )
    _, text, _ = plan(model, *STEP, "--this-machine")
    assert "Device        rates and links measured with 4 GPU(s), memory of the driver, network assumed\n" in text
    # A network cannot be measured on one machine: what the user states counts.
    slow, fast = (
        plan_json(model, *STEP, "--this-machine", "--devices", "8", "--network-gbit-per-device", rate)["plans"][0]
        for rate in ("0.01", "800")
    )
    assert slow["step_time_s"] > fast["step_time_s"]
    assert asked == [4, 4, 4, 4]


def step_time(content):
    return content["plans"][0]["step_time_s"]


def test_stated_links_win(plan_json, model):
    devices = ("--device", "H200", "--devices", "16")
    usual = plan_json(model, *STEP, *devices)
    assert usual["accelerator"]["nodes"] == 2
    assert plan_json(model, *STEP, *devices, "--devices-per-node", "4")["accelerator"]["nodes"] == 4
    assert plan_json(model, *STEP, *devices, "--network-gbit-per-device", "400")["plans"] == usual["plans"]
    assert step_time(plan_json(model, *STEP, *devices, "--network-gbit-per-device", "1")) > step_time(usual)


def test_stated_links_of_an_accelerator_make_it_another_cluster(plan_json, model):
    usual = plan_json(model, *STEP, "--accelerator", "1.5xLarge.768GB")
    changed = plan_json(model, *STEP, "--accelerator", "1.5xLarge.768GB", "--network-gbit-per-device", "1")
    assert changed["accelerator"]["name"] is None
    assert (changed["accelerator"]["devices"], changed["accelerator"]["nodes"]) == (12, 2)
    assert step_time(changed) >= step_time(usual)


def test_packages_are_not_cut(plan, model):
    code, _, err = plan(model, *STEP, "--accelerator", "4", "--devices-per-node", "1")
    assert code == 1
    assert err == ("error: 1 devices on each node: MI250 GCD comes in packages of 2; give a multiple of that\n")


def write_cluster(tmp_path, text):
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_cluster_of_a_file(plan_json, model, tmp_path):
    text = "device: H200\ndevices_per_node: 4\nnodes: 3\nnode_gbyte_per_device: 900\nnetwork_gbit_per_device: 100.5\n"
    path = write_cluster(tmp_path, text)
    content = plan_json(model, *STEP, "--cluster", path)
    accelerator = content["accelerator"]
    assert (accelerator["device"], accelerator["devices"], accelerator["nodes"]) == ("H200", 12, 3)
    again = plan_json(model, *STEP, "--cluster", path, "--devices-per-node", "2")["accelerator"]
    assert (again["devices"], again["nodes"]) == (12, 6), "the command line wins over the file"
    slow = write_cluster(tmp_path, text.replace("100.5", "1").replace("900", "1"))
    assert step_time(plan_json(model, *STEP, "--cluster", slow)) > step_time(content)


def test_network_of_a_node_and_of_switches(plan_json, model, tmp_path):
    def step(*lines):
        text = "\n".join(("device: H200", "devices_per_node: 2", "nodes: 4", *lines))
        return step_time(plan_json(model, *STEP, "--cluster", write_cluster(tmp_path, f"{text}\n")))

    per_device, per_node = step("network_gbit_per_device: 10"), step("network_gbit_per_node: 20")
    assert per_node == per_device
    switches = step("network_gbit_per_node: 20", "nodes_per_switch: 2", "oversubscription: 4")
    assert per_device < switches <= step("network_gbit_per_node: 5")
    assert step("network_gbit_per_node: 20", "nodes_per_switch: 4", "oversubscription: 4") == per_device


def test_cluster_without_links_has_the_usual_ones(plan_json, model, tmp_path):
    path = write_cluster(tmp_path, "device: h200\nnodes: 2\n")
    content = plan_json(model, *STEP, "--cluster", path)
    assert content["accelerator"]["devices"] == 2 * find_device("H200").devices_per_node
    assert content["plans"] == plan_json(model, *STEP, "--device", "H200", "--devices", "16")["plans"]


def test_cluster_of_machines_like_this_one(plan_json, model, tmp_path, monkeypatch):
    show_gpus(monkeypatch, [A100] * 4)
    path = write_cluster(tmp_path, "device: this machine\nnodes: 2\n")
    accelerator = plan_json(model, *STEP, "--cluster", path)["accelerator"]
    assert (accelerator["device"], accelerator["devices"], accelerator["nodes"]) == (A100, 8, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "device: H200\nnode: 2\n",
            ":2: node: unknown key; did you mean nodes? The keys are device, devices_per_node, ",
        ),
        ("nodes: 2\n", ": device is missing: give a kind of device that 'moreh-plan --help' lists"),
        ("device: H300\n", ": device: no device 'H300': known devices are "),
        ("device: this machine\n", ": device: torch sees no GPU on this machine"),
        ("device: [H200]\n", ":1: device is 'several values': give the name"),
        ("device: H200\nnodes: two\n", ":2: nodes is 'two': give a whole number from 1 to 100,000"),
        ('device: H200\nnodes: "2"\n', ":2: nodes is '2': give a whole number"),
        ("device: H200\nnodes: 0\n", ":2: nodes is '0': give a whole number"),
        ("device: H200\nnodes: 1.5\n", ":2: nodes is '1.5': give a whole number"),
        ("device: H200\nnodes:\n", ":2: nodes is '': give a whole number"),
        ("device: H200\nnodes: true\n", ":2: nodes is 'true': give a whole number"),
        ("device: H200\nnode_gbyte_per_device: .nan\n", ":2: node_gbyte_per_device is '.nan': give a number above 0"),
        ("device: H200\nnode_gbyte_per_device: nan\n", ":2: node_gbyte_per_device is 'nan': give a number above 0"),
        ("device: H200\nnetwork_gbit_per_device: -1\n", ":2: network_gbit_per_device is '-1': give a number above 0"),
        ("device: H200\nnetwork_gbit_per_device: 1_0\n", ":2: network_gbit_per_device is '1_0': give a number"),
        ("device: H200\ndevice: B200\n", ":2: device is given twice: remove one"),
        ("device: H200\nnodes_per_switch: 2\n", ": nodes_per_switch and oversubscription belong together: give both"),
        (
            "device: H200\nnodes_per_switch: 2\noversubscription: 0.5\n",
            ": oversubscription is 0.5: give at least 1, such as 2 for 2:1",
        ),
        (
            "device: H200\nnetwork_gbit_per_device: 2\nnetwork_gbit_per_node: 2\n",
            ": network_gbit_per_node and network_gbit_per_device say the same: give one",
        ),
        ("- H200\n", ": give keys such as 'device: H200', of device, devices_per_node, "),
        ("", ": give keys such as 'device: H200'"),
        ("device: [\n", ": not valid YAML: "),
    ],
)
def test_wrong_cluster_is_refused_in_a_line(plan, model, tmp_path, text, message):
    path = write_cluster(tmp_path, text)
    code, out, err = plan(model, *STEP, "--cluster", path)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {path}{message}")
    assert err.count("\n") == 1


def test_missing_file_is_refused(plan, model, tmp_path):
    code, _, err = plan(model, *STEP, "--cluster", tmp_path / "none.yaml")
    assert (code, err) == (1, f"error: {tmp_path / 'none.yaml'}: there is no such file\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--this-machine", "--accelerator", "4"), "--accelerator cannot be combined with --this-machine"),
        (("--this-machine", "--cluster", "c"), "--this-machine cannot be combined with --cluster"),
        (("--device", "H200", "--devices", "2", "--this-machine"), "--device cannot be combined with --this-machine"),
        (("--cluster", "c", "--flavors"), "--cluster cannot be combined with --flavors"),
        (("--devices-per-node", "2", "--flavors"), "--devices-per-node cannot be combined with --flavors"),
        (
            ("--network-gbit-per-device", "2", "--flavors"),
            "--network-gbit-per-device cannot be combined with --flavors",
        ),
        (("--cluster", "c", "--devices", "2"), "--device and --devices are given together"),
        (("--network-gbit-per-device", "0"), "give a number above 0"),
        (("--devices-per-node", "0"), "give a whole number"),
    ],
)
def test_wrong_command_lines(plan, model, arguments, message):
    code, _, err = plan(model, *STEP, *arguments)
    assert code == 2
    assert message in err


def test_json_stays_readable_for_machines(plan_json, model, monkeypatch):
    show_gpus(monkeypatch, [A100])
    assert json.loads(json.dumps(plan_json(model, *STEP), allow_nan=False))
