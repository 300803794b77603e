"""Suggestions if no plan fits in memory: a larger accelerator, more memory, or other options."""

from dataclasses import replace
from math import ceil

from moreh.accelerator.flavors import all_flavors
from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.search.candidates import candidate_tables
from moreh.planner.search.constraints import constraints_text
from moreh.planner.search.relaxations import has_candidates, on_usable_devices
from moreh.planner.search.request import Request
from moreh.planner.search.search import SearchOutcome
from moreh.planner.units import gib

# Multiples of the number of devices to try for devices that are in no list of accelerators.
DEVICE_MULTIPLES = (2, 4, 8, 16, 32, 64)


def nothing_fits_text(request: Request, outcome: SearchOutcome) -> str:
    """The reason why no plan of a request fits, and remedies."""
    smallest, device = outcome.result.smallest_bytes, request.device
    all_devices = request.environment.cluster.devices
    percent = f"{100 * request.constraints.memory_fraction:g}% of {gib(device.memory_bytes)}"
    where = f" on {outcome.environment.cluster.devices} of {all_devices} devices" if outcome.idle else ""
    problem = (
        f"no plan fits{where}: the smallest needs {gib(smallest)} on its fullest device, and {device.name} leaves "
        f"{gib(request.limit_bytes)} ({percent})"
    )
    larger = smallest_sufficient(request)
    if larger is not None:
        remedies = [f"take {larger.accelerator}, the smallest on which one fits"]
    elif _is_this_machines_cpu(request):
        remedies = []
    else:
        times = f"{DEVICE_MULTIPLES[0]} to {DEVICE_MULTIPLES[-1]} times as many devices"
        is_listed = request.flavor is not None and request.flavor.simulated
        problem += f", and no {'larger accelerator' if is_listed else times} would do"
        remedies = []
    options = (
        [f"--memory-percent {ceil(100 * smallest / device.memory_bytes)}"] if smallest <= device.memory_bytes else []
    )
    if request.constraints.max_context < all_devices:
        any_context = replace(request.constraints, max_context=all_devices)
        options += ["a larger --max-context"] if fits_memory(replace(request, constraints=any_context)) else []
    options.append("a smaller batch or length")
    if constraints_text(request.constraints):
        options.append("fewer restrictions")
    return f"{problem}: {', or '.join([*remedies, 'give ' + ', or '.join(options)])}"


def smallest_sufficient(request: Request) -> Request | None:
    """The request on the smallest larger accelerator on which a plan fits, or on 2, 4, ... times as many devices.

    None if there is none, and always for this machine's CPU, where more workers would share the same memory.
    """
    devices = request.environment.cluster.devices
    if request.flavor is not None and request.flavor.simulated:
        flavors = sorted(
            (flavor for flavor in all_flavors() if flavor.devices > devices), key=lambda flavor: flavor.devices
        )
        larger_requests = (request.on_flavor(flavor) for flavor in flavors)
    elif _is_this_machines_cpu(request):
        return None
    else:
        larger_requests = (request.on_devices(multiple * devices) for multiple in DEVICE_MULTIPLES)
    return next((larger for larger in larger_requests if fits_memory(larger)), None)


def _is_this_machines_cpu(request: Request) -> bool:
    return request.device.name == THIS_MACHINE


def fits_memory(request: Request) -> bool:
    """True if a plan of the request fits in memory, on the devices that the search would use."""
    usable = next((smaller for smaller in on_usable_devices(request) if has_candidates(smaller)), None)
    if usable is None:
        return False
    environment = usable.environment
    for table in candidate_tables(environment.roofline, environment.cluster, usable.training, usable.constraints):
        needed_bytes = peak_memory(table, usable.training, environment.software).total.max(axis=1)
        if bool((needed_bytes <= usable.limit_bytes).any()):
            return True
    return False
