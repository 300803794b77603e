"""Searching plans for a request, and what would help where there is none on all devices or none that fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from moreh.accelerator.flavors import Flavor, all_flavors
from moreh.errors import PlanError
from moreh.planner.cost.memory import memory
from moreh.planner.cost.prediction import Environment, make_environment
from moreh.planner.hardware.cluster import cluster_for_devices, cluster_for_flavor
from moreh.planner.hardware.measured_device import NAME as THIS_MACHINE
from moreh.planner.search.candidates import candidate_tables
from moreh.planner.search.request import Request, constraints_text
from moreh.planner.search.search import SearchResult, search_on_most_devices
from moreh.planner.units import gib

# Where no list of accelerators says what is larger.
TIMES_DEVICES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found, the setting with the devices that it uses, and why some stay idle (empty where none does)."""

    result: SearchResult
    setting: Environment
    idle: str


def search_plans(request: Request, count: int) -> SearchOutcome:
    """The best plans of a request, on all devices or on as many as can be used.

    Raises:
        PlanError: nothing satisfies the restrictions; the message says without which one there would be plans.
    """
    try:
        found = SearchOutcome(*search_on_most_devices(request.training, request.setting, request.restrictions, count))
    except PlanError as error:
        freed = _freed(request, all_devices=False)
        raise PlanError(f"{error}; there are plans {freed}" if freed else str(error)) from None
    if not found.idle:
        return found
    idle = found.idle.partition(": give ")[0]
    idle = idle.removesuffix(" as asked")
    freed = _freed(request, all_devices=True)
    return replace(found, idle=f"{idle}; there are plans on all devices {freed}" if freed else idle)


def _freed(request: Request, all_devices: bool) -> str:
    """The options of which each alone leaves no plan, such as "without --stages 3"; empty where there is no such option."""
    given = request.restrictions
    freed = {
        f"without --stages {given.pipeline}": replace(given, pipeline=None),
        f"without --micro-batches {given.micro_batches}": replace(given, micro_batches=None),
        "without --shard-parameters yes": replace(given, shard_parameters=None),
        f"without --max-tensor {given.max_tensor}": replace(given, max_tensor=None),
        "with a larger --max-context": replace(
            given, max_context=max(given.max_context, request.setting.cluster.devices)
        ),
    }
    others = ((text, replace(request, restrictions=other)) for text, other in freed.items() if other != given)
    return ", or ".join(text for text, other in others if any(_possible(one) for one in _settings(other, all_devices)))


def _settings(request: Request, all_devices: bool) -> Iterator[Request]:
    """The request on all devices, then on the smaller numbers that `search_on_most_devices` turns to."""
    setting = request.setting
    devices = setting.cluster.devices
    for used in (number for number in range(devices, 0, -1) if devices % number == 0):
        yield replace(request, setting=replace(setting, cluster=replace(setting.cluster, devices=used)))
        if all_devices:
            return


def _possible(request: Request) -> bool:
    """Whether there is any plan on all devices, in memory or not."""
    setting = request.setting
    try:
        return any(
            True for _ in candidate_tables(setting.roofline, setting.cluster, request.training, request.restrictions)
        )
    except PlanError:
        return False


def on_flavor(request: Request, flavor: Flavor) -> Request:
    """The same request for another accelerator."""
    setting = make_environment(cluster_for_flavor(flavor), request.setting.implementation)
    return replace(request, flavor=flavor, setting=setting)


def nothing_fits_text(request: Request, found: SearchOutcome) -> str:
    """Why no plan fits, and what would help."""
    smallest, device = found.result.smallest_bytes, request.device
    percent = f"{100 * request.restrictions.memory_fraction:g}% of {gib(device.memory_bytes)}"
    where = f" on {found.setting.cluster.devices} of {request.setting.cluster.devices} devices" if found.idle else ""
    problem = (
        f"no plan fits{where}: the smallest needs {gib(smallest)} on its fullest device, and {device.name} leaves "
        f"{gib(request.limit_bytes)} ({percent})"
    )
    larger = smallest_sufficient(request)
    if larger is not None:
        remedies = [f"take {larger.accelerator}, the smallest on which one fits"]
    elif device.efficiency_class == THIS_MACHINE:
        remedies = []
    else:
        times = f"{TIMES_DEVICES[0]} to {TIMES_DEVICES[-1]} times as many devices"
        problem += f", and no {'larger accelerator' if request.flavor else times} would do"
        remedies = []
    options = (
        [f"--memory-percent {ceil(100 * smallest / device.memory_bytes)}"] if smallest <= device.memory_bytes else []
    )
    most = request.setting.cluster.devices
    if request.restrictions.max_context < most:
        free = replace(request.restrictions, max_context=most)
        options += ["a larger --max-context"] if _fits(replace(request, restrictions=free)) else []
    options.append("a smaller batch or length")
    if constraints_text(request.restrictions):
        options.append("fewer restrictions")
    return f"{problem}: {', or '.join([*remedies, 'give ' + ', or '.join(options)])}"


def smallest_sufficient(request: Request) -> Request | None:
    """The request on the smallest larger accelerator on which a plan fits, or on two, four, ... times as many devices."""
    devices = request.setting.cluster.devices
    if request.flavor is not None:
        larger = sorted(
            (flavor for flavor in all_flavors() if flavor.devices > devices), key=lambda flavor: flavor.devices
        )
        requests = (on_flavor(request, flavor) for flavor in larger)
    elif request.device.efficiency_class == THIS_MACHINE:  # more workers would share the same memory
        return None
    else:
        requests = (_on_devices(request, times * devices) for times in TIMES_DEVICES)
    return next((other for other in requests if _fits(other)), None)


def _on_devices(request: Request, devices: int) -> Request:
    return replace(request, setting=replace(request.setting, cluster=cluster_for_devices(request.device, devices)))


def _fits(request: Request) -> bool:
    """Whether a plan fits, on the devices that the search would use."""
    here = next((one for one in _settings(request, all_devices=False) if _possible(one)), None)
    if here is None:
        return False
    setting = here.setting
    for table in candidate_tables(setting.roofline, setting.cluster, here.training, here.restrictions):
        needed = memory(table, here.training, setting.implementation).total.max(axis=1)
        if bool((needed <= here.limit_bytes).any()):
            return True
    return False
