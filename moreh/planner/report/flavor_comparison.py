"""Compares a training on all accelerators: memory, speed and price."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moreh.accelerator.flavors import Flavor, all_flavors
from moreh.errors import PlanError
from moreh.planner.cost.prediction import Prediction
from moreh.planner.search.request import Request
from moreh.planner.search.search import search_plans
from moreh.planner.units import gib

SECONDS_PER_HOUR = 3600.0
# What a message says after the problem: advice for the one accelerator that was searched.
_ADVICE = re.compile(": give |; there are plans")


@dataclass(frozen=True)
class FlavorPlan:
    """An accelerator with its best plan."""

    flavor: Flavor
    best: Prediction | None
    """The predicted cost; None if no plan fits or none is possible."""
    smallest_bytes: float | None = None
    """Memory per device of the plan that needs the least; None where no plan is possible."""
    problem: str | None = None
    """The reason why there is no plan."""
    devices_in_use: int | None = None
    """The devices that the best plan uses; None where no plan is possible."""
    idle: str = ""
    """The reason why the plan does not use all devices; empty if it does."""

    @property
    def devices_text(self) -> str:
        """The numbers of devices and of idle devices."""
        if not self.idle or self.devices_in_use is None:
            return str(self.flavor.devices)
        return f"{self.flavor.devices} ({self.flavor.devices - self.devices_in_use} idle)"

    @property
    def tokens_per_second(self) -> float:
        """The speed of the best plan; 0 where there is none."""
        return self.best.tokens_per_second if self.best else 0.0

    @property
    def tokens_per_device_second(self) -> float:
        """The speed for each device of the accelerator, idle or not."""
        return self.tokens_per_second / self.flavor.devices


@dataclass(frozen=True)
class Bill:
    """The time and price of a whole training on an accelerator."""

    hours: float
    device_hours: float
    """Hours times devices of the accelerator."""
    cost: float | None
    """Device-hours times the price of one, in the unit of that price; None without a price."""


def compare_flavors(request: Request) -> tuple[FlavorPlan, ...]:
    """The best plan of the request's training on each accelerator of the request's kind of device.

    Device-hours of other devices would be no measure of cost.
    """
    return tuple(_best_on(flavor, request) for flavor in all_flavors() if flavor.device == request.device)


def bill(row: FlavorPlan, dataset_tokens: float, price: float | None) -> Bill | None:
    """The time and price of a training of so many tokens; None without a plan. `price` is that of a device-hour."""
    if row.best is None:
        return None
    hours = dataset_tokens / row.tokens_per_second / SECONDS_PER_HOUR
    device_hours = hours * row.flavor.devices
    return Bill(hours, device_hours, None if price is None else device_hours * price)


def cheapest(rows: Iterable[FlavorPlan]) -> FlavorPlan | None:
    """The accelerator with the fewest device-hours, which is the cheapest at one price for all devices."""
    fitting = [row for row in rows if row.best is not None]
    return max(fitting, key=lambda row: row.tokens_per_device_second, default=None)


def fastest(rows: Iterable[FlavorPlan]) -> FlavorPlan | None:
    """The accelerator that finishes first."""
    fitting = [row for row in rows if row.best is not None]
    return max(fitting, key=lambda row: row.tokens_per_second, default=None)


def _best_on(flavor: Flavor, request: Request) -> FlavorPlan:
    flavor_request = request.on_flavor(flavor)
    try:
        outcome = search_plans(flavor_request, count=1)
    except PlanError as error:
        return FlavorPlan(flavor, None, problem=_ADVICE.split(str(error))[0])
    best, smallest = (outcome.result.best or (None,))[0], outcome.result.smallest_bytes
    problem = None if best else f"does not fit: needs {gib(smallest)}"
    return FlavorPlan(flavor, best, smallest, problem, outcome.environment.cluster.devices, outcome.idle)
