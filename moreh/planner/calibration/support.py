"""Cases that the cost model does not know well, and the least width of their intervals."""

from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.models.architecture import Architecture
from moreh.planner.hardware.efficiency import uncertainty
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.schedules import SPLIT_BACKWARD

# The truth may be this many times more or less than predicted where the model leaves something out.
NOT_MODELED = 2.0
# The same where something is modeled but was hardly ever measured.
HARDLY_MEASURED = 1.45
# The largest figures of published runs.
LONGEST_SEQUENCE, MOST_DEVICES = 65_536, 3_072


def least_factor(plan: Plan, training: Training, environment: Environment) -> tuple[float, str]:
    """The least factor between a prediction and either end of its interval, and why; 1 and "" without a reason."""
    device, optimizer = environment.cluster.device, training.optimizer
    if environment.software.not_modeled:
        return NOT_MODELED, environment.software.not_modeled
    if has_experts(training.architecture):
        return NOT_MODELED, "how evenly tokens are routed to experts is not modeled"
    if plan.context > 1:
        return NOT_MODELED, "no published run with context parallelism was compared with"
    if environment.software.compute == "float8":
        return NOT_MODELED, "the share of a step that a program computes in float8 is not modeled"
    if optimizer.gathers_matrices and plan.devices > 1:
        return NOT_MODELED, f"the time in which {optimizer.name} gathers matrices is not modeled"
    if device.efficiency_class == THIS_MACHINE:
        return 1.0, ""
    if device.efficiency_assumed or uncertainty(device.efficiency_class).runs == 0:
        return HARDLY_MEASURED, f"no published run on a {device.name} was compared with"
    rare = _hardly_measured(plan, training)
    return (HARDLY_MEASURED, f"no published run with {rare} was compared with") if rare else (1.0, "")


def _hardly_measured(plan: Plan, training: Training) -> str:
    """The mechanisms that are modeled but in none of the published runs; empty if there are none."""
    layers = training.architecture.layers
    found = (
        (any(layer.state_elements for layer in layers), "linear attention"),
        (any(layer.window and layer.window < training.sequence_length for layer in layers), "a sliding window"),
        (any(linear.frozen for layer in layers for linear in layer.linears), "frozen weights"),
        (plan.schedule in SPLIT_BACKWARD, "a split backward pass"),
        (plan.replicas > 1, "hybrid sharding"),
        (training.sequence_length > LONGEST_SEQUENCE, f"sequences of more than {LONGEST_SEQUENCE:,} tokens"),
        (plan.devices > MOST_DEVICES, f"more than {MOST_DEVICES:,} devices"),
    )
    return next((what for holds, what in found if holds), "")


def has_experts(architecture: Architecture) -> bool:
    """True if a layer has linear layers of which each token uses only some."""
    return any(linear.active != linear.copies for layer in architecture.layers for linear in layer.linears)
