"""Memory by the names of the tools that show it."""

import pytest

from moreh.accelerator.devices import all_devices, find_device
from moreh.accelerator.flavors import Flavor, find_flavor
from moreh.planner.cost.memory.driver_memory import driver_memory, driver_tool
from moreh.planner.cost.prediction import predict
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.report.chosen_plan import memory_text
from tests.helpers.planner.cases import LLAMA, environment_of


def test_driver_shows_more_than_torch_and_more_with_every_group():
    alone = driver_memory(Plan((8,)), 10e9)
    assert 10e9 == alone.allocated < alone.reserved < alone.in_use
    groups = driver_memory(Plan((8,), tensor=2, data=2), 10e9)
    assert groups.in_use > alone.in_use
    assert groups.reserved == alone.reserved


def test_tool_is_that_of_the_maker():
    amd = {name for name in all_devices() if driver_tool(find_device(name)) == "rocm-smi"}
    assert amd == {name for name in all_devices() if name.startswith(("MI", "RX 7"))}


@pytest.mark.parametrize("simulated", [False, True])
def test_log_names_the_memory_of_real_gpus(simulated):
    prediction = predict(Plan((8,)), Training(LLAMA, 1, 512), environment_of("H100 80GB", 1))
    flavor = Flavor("x", find_device("H100 80GB"), 1, nodes=1, simulated=simulated)
    text = memory_text(prediction, flavor)
    assert ("torch.cuda.max_memory_allocated()" in text and "in nvidia-smi" in text) == (not simulated)
    assert find_flavor("Small.64GB").simulated
