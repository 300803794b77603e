"""Records the plans that are chosen in the job of this process, where a report of the run finds them."""

from moreh.accelerator.flavors import Flavor
from moreh.accelerator.job import LocalJob
from moreh.accelerator.job_status import ChosenPlan
from moreh.planner.cost.prediction import Prediction
from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.plan import Training


def record_flavor_plan(job: LocalJob, flavor: Flavor, prediction: Prediction, training: Training) -> None:
    """Record the plan for the devices of an accelerator, real or simulated."""
    devices = f"{flavor.devices} x {flavor.device.name}"
    _record(job, devices, plan_text(prediction.plan), prediction, training, simulated=flavor.simulated)


def record_local_plan(job: LocalJob, workers: int, plan: str, prediction: Prediction, training: Training) -> None:
    """Record the plan that the workers on this machine carry out."""
    devices = f"this machine, {workers} worker{'s' if workers > 1 else ''}"
    _record(job, devices, plan, prediction, training, simulated=False)


def _record(
    job: LocalJob, devices: str, plan: str, prediction: Prediction, training: Training, *, simulated: bool
) -> None:
    job.keep_plan(
        ChosenPlan(
            devices,
            simulated,
            plan,
            training.global_batch_size,
            training.sequence_length,
            prediction.step_time_s,
            prediction.memory_bytes,
        )
    )
