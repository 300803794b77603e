"""The sensitivity of a predicted step time to each constant of the cost model."""

from dataclasses import asdict, replace

import numpy as np

from moreh.planner.cost.prediction import step_seconds
from moreh.planner.cost.stage_time import stage_time
from moreh.planner.hardware.efficiency import Efficiency
from moreh.planner.hardware.efficiency_distribution import CONSTANTS, from_unconstrained, to_unconstrained
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.plan_table import PlanTable

# The step of the finite difference, in unconstrained constants.
DISTANCE = 0.05


def log_step_time(plan: Plan, training: Training, environment: Environment) -> float:
    """The logarithm of the predicted seconds of a step."""
    table = PlanTable.from_plans([plan])
    times = stage_time(environment.roofline, environment.cluster, table, training)
    return float(np.log(step_seconds(table, 0, times)))


def log_step_time_slopes(plan: Plan, training: Training, environment: Environment) -> FloatArray:
    """The derivatives of `log_step_time` by the unconstrained constants, [constants]; 0 for constants of 0."""
    center = log_step_time(plan, training, environment)
    mean, values = to_unconstrained(environment.efficiency), asdict(environment.efficiency)
    slopes = np.zeros(len(CONSTANTS))
    for index, name in enumerate(CONSTANTS):
        if values[name] == 0 or not used_constant(name, plan, environment):
            continue
        moved = mean.copy()
        moved[index] += DISTANCE
        other: Efficiency = replace(environment.efficiency, **{name: getattr(from_unconstrained(moved), name)})
        slopes[index] = (log_step_time(plan, training, replace(environment, efficiency=other)) - center) / DISTANCE
    return slopes


def used_constant(name: str, plan: Plan, environment: Environment) -> bool:
    """True if a constant can matter to a plan at all: most plans leave some out, and each costs a prediction."""
    if name == "float8":
        return environment.software.compute == "float8"
    if name in ("node", "node_hop_s", "partial_node", "contention"):
        return plan.devices > 1
    if name in ("network", "network_hop_s"):
        return environment.cluster.nodes > 1
    return name != "skew" or plan.tensor > 1
