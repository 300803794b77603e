"""The plans that were chosen for a job, as a report of its run shows them."""

from moreh.accelerator.flavors import Flavor
from moreh.accelerator.job_status import ChosenPlan
from moreh.planner.cost.prediction import Prediction
from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.plan import Training


def flavor_plan(flavor: Flavor, prediction: Prediction, training: Training) -> ChosenPlan:
    """The plan for the devices of an accelerator, real or simulated."""
    devices = f"{flavor.devices} x {flavor.device.name}"
    return _chosen(devices, plan_text(prediction.plan), prediction, training, simulated=flavor.simulated)


def local_plan(workers: int, plan: str, prediction: Prediction, training: Training) -> ChosenPlan:
    """The plan that the workers on this machine carry out."""
    devices = f"this machine, {workers} worker{'s' if workers > 1 else ''}"
    return _chosen(devices, plan, prediction, training, simulated=False)


def _chosen(devices: str, plan: str, prediction: Prediction, training: Training, *, simulated: bool) -> ChosenPlan:
    return ChosenPlan(
        devices,
        simulated,
        plan,
        training.global_batch_size,
        training.sequence_length,
        prediction.step_time_s,
        prediction.memory_bytes,
    )
