"""The same training on every accelerator of the list: what fits, how fast it is, and which one to take."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from moreh.accelerator.flavors import Flavor, all_flavors
from moreh.errors import PlanError
from moreh.planner.cost.prediction import Prediction
from moreh.planner.plan.notation import plan_text
from moreh.planner.report.report import Json, memory_text, prediction_json
from moreh.planner.search.constraints import constraints_text
from moreh.planner.search.request import Request
from moreh.planner.search.search import search_plans
from moreh.planner.units import gib, percent_text

SECONDS_PER_HOUR = 3600.0
# A larger accelerator that loses no more than this share is worth a line.
NEAR_OPTIMAL = 0.03


@dataclass(frozen=True)
class FlavorPlan:
    """An accelerator with its best plan; `problem` says why there is none, `idle` why it is not on all devices."""

    flavor: Flavor
    best: Prediction | None
    smallest_bytes: float | None = None
    problem: str | None = None
    devices_in_use: int | None = None
    idle: str = ""

    @property
    def devices(self) -> str:
        """How many devices there are, and how many of them have nothing to do."""
        if not self.idle or self.devices_in_use is None:
            return str(self.flavor.devices)
        return f"{self.flavor.devices} ({self.flavor.devices - self.devices_in_use} idle)"


@dataclass(frozen=True)
class Bill:
    """What the whole training takes: hours, hours times devices, and their price in the unit it was given in."""

    hours: float
    device_hours: float
    cost: float | None


def compare_flavors(request: Request) -> tuple[FlavorPlan, ...]:
    """The best plan of the request's training on each accelerator."""
    return tuple(_best_on(flavor, request) for flavor in all_flavors())


def _best_on(flavor: Flavor, request: Request) -> FlavorPlan:
    here = request.on_flavor(flavor)
    try:
        found = search_plans(here, count=1)
    except PlanError as error:
        return FlavorPlan(flavor, None, problem=re.split(": give |; there are plans", str(error))[0])
    best, smallest = (found.result.best or (None,))[0], found.result.smallest_bytes
    problem = None if best else f"does not fit: at least {gib(smallest)} needed"
    return FlavorPlan(flavor, best, smallest, problem, found.environment.cluster.devices, found.idle)


def bill(row: FlavorPlan, dataset_tokens: float, price: float | None) -> Bill | None:
    """The hours of a whole training on an accelerator; None where it does not fit."""
    if row.best is None:
        return None
    hours = dataset_tokens / row.best.tokens_per_second / SECONDS_PER_HOUR
    device_hours = hours * row.flavor.devices
    return Bill(hours, device_hours, None if price is None else device_hours * price)


def flavor_headers(dataset_tokens: float | None, price: float | None) -> tuple[str, ...]:
    """The headers of `flavor_rows`."""
    headers = ["Accelerator", "Devices", "Fits", "Best plan", "Memory per device", "Tokens/s", "MFU"]
    if dataset_tokens is not None:
        headers += ["Hours", "Device-hours"]
        headers += ["Cost"] if price is not None else []
    return tuple(headers)


def flavor_rows(
    request: Request, rows: Iterable[FlavorPlan], dataset_tokens: float | None, price: float | None
) -> list[tuple[str, ...]]:
    """A row for each accelerator; that of the request gets a mark."""
    table = []
    for row in rows:
        start = (f"{'*' if row.flavor == request.flavor else ' '} {row.flavor.name}", row.devices)
        cells: tuple[str, ...]
        if row.best is None:
            cells = (*start, "no", row.problem or "", "-", "-", "-")
        else:
            best = row.best
            speed = (f"{best.tokens_per_second:,.0f}", percent_text(best.mfu))
            cells = (*start, "yes", plan_text(best.plan), memory_text(request.on_flavor(row.flavor), best), *speed)
        if dataset_tokens is not None:
            whole = bill(row, dataset_tokens, price)
            amounts = () if whole is None else (whole.hours, whole.device_hours, whole.cost)
            count = 2 if price is None else 3
            cells += tuple(amount_text(amount) for amount in amounts[:count] if amount is not None) or ("-",) * count
        table.append(cells)
    return table


def amount_text(amount: float) -> str:
    """Hours or money: three digits or more."""
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:,.1f}" if amount >= 10 else f"{amount:.3g}"


def cheapest(rows: Iterable[FlavorPlan]) -> FlavorPlan | None:
    """The accelerator with the fewest device-hours, which is also the cheapest at one price for all devices."""
    fitting = [row for row in rows if row.best is not None]
    return max(fitting, key=_tokens_per_device_second, default=None)


def fastest(rows: Iterable[FlavorPlan]) -> FlavorPlan | None:
    """The accelerator that is done first."""
    fitting = [row for row in rows if row.best is not None]
    return max(fitting, key=lambda row: row.best.tokens_per_second if row.best else 0.0, default=None)


def _tokens_per_device_second(row: FlavorPlan) -> float:
    return row.best.tokens_per_second / row.flavor.devices if row.best else 0.0


def recommendation(rows: tuple[FlavorPlan, ...], dataset_tokens: float | None, price: float | None) -> list[str]:
    """Which accelerators to take, and why; a line each, and none where no plan fits on any."""
    saving, quick = cheapest(rows), fastest(rows)
    if saving is None or quick is None or saving.best is None or quick.best is None:
        return []
    rate = f"{_tokens_per_device_second(saving):,.0f} tokens/s on each device"
    whole = None if dataset_tokens is None else bill(saving, dataset_tokens, price)
    if whole is None:
        reason = f"it needs the fewest device-hours: {rate}"
    elif whole.cost is None:
        reason = f"it needs the fewest device-hours, {amount_text(whole.device_hours)}: {rate}"
    else:
        reason = f"it costs least, {amount_text(whole.cost)}: {rate}"
    if saving is quick:
        return [f"Recommended: {saving.flavor.name}; {reason}, and none is faster."]
    lines = [f"Recommended: {saving.flavor.name}; {reason}."]
    least = (1 - NEAR_OPTIMAL) * _tokens_per_device_second(saving)
    almost = fastest(row for row in rows if _tokens_per_device_second(row) >= least)
    if almost is not None and almost not in (saving, quick):
        lines.append(f"Almost as good: {almost.flavor.name}; {_compared(almost, saving)}.")
    return [*lines, f"The fastest: {quick.flavor.name}; {_compared(quick, saving)}."]


def _compared(row: FlavorPlan, saving: FlavorPlan) -> str:
    times = (
        _tokens_per_device_second(row)
        * row.flavor.devices
        / (_tokens_per_device_second(saving) * saving.flavor.devices)
    )
    share = _tokens_per_device_second(saving) / _tokens_per_device_second(row) - 1
    hours = f"for {share:.1%} more device-hours" if share <= 1 else f"for {1 + share:.1f} times the device-hours"
    return f"{times:.2f} times as fast, {hours}"


def flavors_json(
    request: Request, rows: tuple[FlavorPlan, ...], dataset_tokens: float | None, price: float | None
) -> Json:
    """The comparison."""
    flavors = []
    for row in rows:
        whole = None if dataset_tokens is None else bill(row, dataset_tokens, price)
        flavors.append(
            {
                "name": row.flavor.name,
                "devices": row.flavor.devices,
                "devices_in_use": row.devices_in_use,
                "idle": row.idle or None,
                "fits": row.best is not None,
                "problem": row.problem,
                "smallest_bytes": row.smallest_bytes,
                "best": None if row.best is None else prediction_json(request.on_flavor(row.flavor), row.best),
                "hours": whole and whole.hours,
                "device_hours": whole and whole.device_hours,
                "cost": whole and whole.cost,
            }
        )
    saving, quick = cheapest(rows), fastest(rows)
    return {
        "dataset_tokens": dataset_tokens,
        "price_per_device_hour": price,
        "flavors": flavors,
        "cheapest": saving and saving.flavor.name,
        "fastest": quick and quick.flavor.name,
        "recommendation": recommendation(rows, dataset_tokens, price),
        "message": None if saving else no_flavor_text(request, rows),
    }


def no_flavor_text(request: Request, rows: tuple[FlavorPlan, ...]) -> str:
    """Why there is no recommendation, and what would help."""
    device = request.device
    if all(row.smallest_bytes is None for row in rows):
        return f"no accelerator can be used: {rows[-1].problem} ({rows[-1].flavor.name}): give fewer restrictions"
    smallest = min(row.smallest_bytes for row in rows if row.smallest_bytes is not None)
    options = (
        [f"--memory-percent {ceil(100 * smallest / device.memory_bytes)}"] if smallest <= device.memory_bytes else []
    )
    options += ["a smaller batch or length"] + (
        ["a larger --max-context"] if request.constraints.max_context == 1 else []
    )
    if constraints_text(request.constraints):
        options.append("fewer restrictions")
    return (
        f"no accelerator is large enough: the smallest plan needs {gib(smallest)} on its fullest device, and {device.name} "
        f"leaves {gib(request.limit_bytes)}: give {', or '.join(options)}"
    )
