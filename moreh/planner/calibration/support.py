"""Cases that the cost model does not know well, and the least width of their intervals."""

from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.models.architecture import Architecture
from moreh.planner.hardware.efficiency import uncertainty
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.plan import Plan, Training

# The truth may be this many times more or less than predicted where the model leaves something out.
NOT_MODELED = 2.0
# The same where something is modeled but was hardly ever measured.
HARDLY_MEASURED = 1.45


def least_factor(plan: Plan, training: Training, environment: Environment) -> tuple[float, str]:
    """The least factor between a prediction and either end of its interval, and why; 1 and "" without a reason."""
    device = environment.cluster.device
    if has_experts(training.architecture):
        return NOT_MODELED, "how evenly tokens are routed to experts is not modeled"
    if plan.context > 1:
        return NOT_MODELED, "no published run with context parallelism was compared with"
    if environment.software.compute == "float8":
        return NOT_MODELED, "the share of a step that a program computes in float8 is not modeled"
    if device.efficiency_class == THIS_MACHINE:
        return 1.0, ""
    if device.efficiency_assumed or uncertainty(device.efficiency_class).runs == 0:
        return HARDLY_MEASURED, f"no published run on a {device.name} was compared with"
    return 1.0, ""


def has_experts(architecture: Architecture) -> bool:
    """Whether a layer has linear layers of which each token uses only some."""
    return any(linear.active != linear.copies for layer in architecture.layers for linear in layer.linears)
