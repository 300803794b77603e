"""The same training on every accelerator of the list: what fits, how fast it is, and which one to take."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from moreh.accelerator.flavors import Flavor, all_flavors
from moreh.errors import PlanError
from moreh.planner.candidates import candidate_tables
from moreh.planner.cluster import cluster_of_devices, cluster_of_flavor
from moreh.planner.memory import memory
from moreh.planner.plan_text import plan_text
from moreh.planner.prediction import Prediction, setting_of
from moreh.planner.report import Json, Request, gib, memory_text, percent_text, prediction_json, restrictions_text
from moreh.planner.search import SearchResult, search

SECONDS_PER_HOUR = 3600.0
# Where no list of accelerators says what is larger.
TIMES_DEVICES = (2, 4, 8, 16, 32, 64)
# A larger accelerator that loses no more than this share is worth a line.
ALMOST = 0.03


@dataclass(frozen=True)
class FlavorPlan:
    """An accelerator with its best plan; `problem` says why there is none."""

    flavor: Flavor
    best: Prediction | None
    smallest_bytes: float | None = None
    problem: str | None = None


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
    here = on_flavor(request, flavor)
    try:
        result = search(here.training, here.setting, here.restrictions, count=1)
    except PlanError:
        return FlavorPlan(flavor, None, problem=_indivisible(here))
    if result.best:
        return FlavorPlan(flavor, result.best[0], result.smallest_bytes)
    return FlavorPlan(flavor, None, result.smallest_bytes, f"does not fit: at least {gib(result.smallest_bytes)} needed")


def find_plans(request: Request, count: int) -> SearchResult:
    """The best plans of a request.

    Raises:
        PlanError: the batch cannot be divided, or nothing satisfies the restrictions.
    """
    try:
        return search(request.training, request.setting, request.restrictions, count)
    except PlanError:
        restricted = restrictions_text(request.restrictions)
        under = f" with {restricted}" if restricted else ""
        raise PlanError(
            f"{_indivisible(request)}{under}: give a batch that has more divisors in common with the number of devices, or "
            "fewer restrictions"
        ) from None


def _indivisible(request: Request) -> str:
    """Why there is no candidate at all."""
    devices, stages = request.setting.cluster.devices, request.restrictions.pipeline
    if stages is not None and (devices % stages or stages > len(request.training.architecture.layers)):
        return f"{stages} stages cannot be made of {devices} devices"
    return f"no plan divides the batch of {request.training.global_batch_size} over {devices} devices"


def on_flavor(request: Request, flavor: Flavor) -> Request:
    """The same request for another accelerator."""
    setting = setting_of(cluster_of_flavor(flavor), request.setting.implementation)
    return replace(request, flavor=flavor, setting=setting)


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
        start = (f"{'*' if row.flavor == request.flavor else ' '} {row.flavor.name}", str(row.flavor.devices))
        cells: tuple[str, ...]
        if row.best is None:
            cells = (*start, "no", row.problem or "", "-", "-", "-")
        else:
            best = row.best
            speed = (f"{best.tokens_per_second:,.0f}", percent_text(best.mfu))
            cells = (*start, "yes", plan_text(best.plan), memory_text(on_flavor(request, row.flavor), best), *speed)
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
    """Which accelerators to take, and why; a line each."""
    saving, quick = cheapest(rows), fastest(rows)
    if saving is None or quick is None or saving.best is None or quick.best is None:
        return ["No accelerator is large enough: give a smaller batch or length, or fewer restrictions."]
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
    least = (1 - ALMOST) * _tokens_per_device_second(saving)
    almost = fastest(row for row in rows if _tokens_per_device_second(row) >= least)
    if almost is not None and almost not in (saving, quick):
        lines.append(f"Almost as good: {almost.flavor.name}; {_compared(almost, saving)}.")
    return [*lines, f"The fastest: {quick.flavor.name}; {_compared(quick, saving)}."]


def _compared(row: FlavorPlan, saving: FlavorPlan) -> str:
    times = _tokens_per_device_second(row) * row.flavor.devices / (_tokens_per_device_second(saving) * saving.flavor.devices)
    share = _tokens_per_device_second(saving) / _tokens_per_device_second(row) - 1
    return f"{times:.2f} times as fast, for {share:.1%} more device-hours"


def flavors_json(request: Request, rows: tuple[FlavorPlan, ...], dataset_tokens: float | None, price: float | None) -> Json:
    """The comparison."""
    flavors = []
    for row in rows:
        whole = None if dataset_tokens is None else bill(row, dataset_tokens, price)
        flavors.append(
            {
                "name": row.flavor.name,
                "devices": row.flavor.devices,
                "fits": row.best is not None,
                "problem": row.problem,
                "smallest_bytes": row.smallest_bytes,
                "best": None if row.best is None else prediction_json(on_flavor(request, row.flavor), row.best),
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
    }


def nothing_fits_text(request: Request, smallest_bytes: float) -> str:
    """Why no plan fits, and what would help."""
    percent = f"{100 * request.restrictions.memory_fraction:g}% of {gib(request.device.memory_bytes)}"
    problem = (
        f"no plan fits: the smallest needs {gib(smallest_bytes)} on its fullest device, and {request.device.name} leaves "
        f"{gib(request.limit_bytes)} ({percent})"
    )
    larger = smallest_sufficient(request)
    if larger is None:
        tried = (
            "no larger accelerator" if request.flavor else f"no {TIMES_DEVICES[0]} to {TIMES_DEVICES[-1]} times as many devices"
        )
        return f"{problem}, and {tried} would do: give a smaller batch or length, or fewer restrictions"
    return f"{problem}: take {larger.accelerator}, the smallest on which one fits, or a smaller batch or length"


def smallest_sufficient(request: Request) -> Request | None:
    """The request on the smallest larger accelerator on which a plan fits, or on two, four, ... times as many devices."""
    devices = request.setting.cluster.devices
    if request.flavor is not None:
        larger = sorted((flavor for flavor in all_flavors() if flavor.devices > devices), key=lambda flavor: flavor.devices)
        requests = (on_flavor(request, flavor) for flavor in larger)
    else:
        requests = (_on_devices(request, times * devices) for times in TIMES_DEVICES)
    return next((other for other in requests if _fits(other)), None)


def _on_devices(request: Request, devices: int) -> Request:
    cluster = cluster_of_devices(request.device, devices)
    return replace(request, setting=setting_of(cluster, request.setting.implementation))


def _fits(request: Request) -> bool:
    setting = request.setting
    try:
        for table in candidate_tables(setting.roofline, setting.cluster, request.training, request.restrictions):
            needed = memory(table, request.training, setting.implementation).total.max(axis=1)
            if bool((needed <= request.limit_bytes).any()):
                return True
    except PlanError:  # nothing divides the batch there
        pass
    return False
