"""The plans of a job, for the report of its run."""

from moreh.accelerator.flavors import Flavor
from moreh.accelerator.job_status import ChosenPlan, PipelineTimes
from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.planner.cost.memory.driver_memory import driver_memory, driver_tool
from moreh.planner.cost.prediction import Prediction
from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.plan import Training
from moreh.planner.units import gib


def flavor_plan(flavor: Flavor, prediction: Prediction, training: Training) -> ChosenPlan:
    """The plan for the devices of an accelerator, real or simulated."""
    devices = f"{flavor.devices} x {flavor.device.name}"
    text = plan_text(prediction.plan)
    return _chosen(devices, flavor.device.name, text, prediction, training, simulated=flavor.simulated)


def local_plan(
    workers: int, plan: str, prediction: Prediction, training: Training, device: str = THIS_MACHINE
) -> ChosenPlan:
    """The plan that the workers on this machine run; `device` is the kind of its GPUs, if it has some."""
    devices = f"this machine, {workers} worker{'s' if workers > 1 else ''}"
    return _chosen(devices, device, plan, prediction, training, simulated=False)


def local_device(flavor: Flavor) -> str:
    """The kind of device that the workers compute on: the GPUs of this machine, or its CPU."""
    return THIS_MACHINE if flavor.simulated else flavor.device.name


def memory_text(prediction: Prediction, flavor: Flavor) -> str:
    """The predicted memory, on a GPU by the names of the tools that show it."""
    if flavor.simulated:
        return gib(prediction.memory_bytes)
    memory = driver_memory(prediction.plan, prediction.memory_bytes)
    tool = driver_tool(flavor.device)
    return f"{gib(memory.allocated)} in torch.cuda.max_memory_allocated(), {gib(memory.in_use)} in {tool}"


def _chosen(
    devices: str, device: str, plan: str, prediction: Prediction, training: Training, *, simulated: bool
) -> ChosenPlan:
    return ChosenPlan(
        devices,
        simulated,
        plan,
        training.global_batch_size,
        training.sequence_length,
        prediction.step_time_s,
        prediction.memory_bytes,
        plan_text(prediction.plan),
        device,
        prediction.plan.devices,
        pipeline_times(prediction),
    )


def pipeline_times(prediction: Prediction) -> PipelineTimes:
    """The arguments of `simulate` for a predicted step."""
    plan = prediction.plan
    return PipelineTimes(
        plan.schedule,
        plan.pipeline,
        plan.micro_batches,
        plan.chunks,
        prediction.stage_forward_s,
        prediction.stage_backward_s,
        prediction.weight_fraction,
        prediction.send_s,
    )
