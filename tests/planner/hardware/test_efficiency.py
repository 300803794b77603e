"""What is said of the errors of predictions for a kind of device."""

from moreh.accelerator.devices import find_device
from moreh.planner.hardware.efficiency import errors_text


def test_errors_of_a_device_without_published_runs_are_not_called_its_own():
    assert "published runs on B200 (" in errors_text(find_device("GB300"))
    assert errors_text(find_device("GB300")).endswith("; there is none on GB300")
    assert "there is none" not in errors_text(find_device("B200"))
    # No device of this class has any.
    assert errors_text(find_device("MI355X")) == errors_text(find_device("MI300X"))
    assert errors_text(find_device("MI355X")).endswith("published runs on other devices; there is none on these")
