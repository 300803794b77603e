"""The comparison of accelerators as a table, as a recommendation, and as JSON.

`dataset_tokens` are the tokens of the whole training, `price` is that of a device-hour; None where they were not given.
"""

from collections.abc import Iterable
from math import ceil

from moreh.planner.plan.notation import plan_text
from moreh.planner.report.flavor_comparison import FlavorPlan, bill, cheapest, fastest
from moreh.planner.report.json_output import Json, prediction_json
from moreh.planner.report.plan_rows import memory_text, without_percent
from moreh.planner.search.constraints import constraints_text
from moreh.planner.search.request import Request
from moreh.planner.units import gib, percent_text
from moreh.tables import Column, Table

# A larger accelerator is recommended as well if it needs at most this share more device-hours.
NEAR_OPTIMAL = 0.03
FLAVOR_COLUMNS = (
    Column("Accelerator", 4),
    Column("Devices", 4, "right"),
    Column("Fits", 4),
    Column("Best plan", 4, wraps=True),
    Column("Memory per device", 4, "right"),
    Column("Tokens/s", 4, "right"),
    Column("MFU", 4, "right"),
)
BILL_COLUMNS = (Column("Hours", 4, "right"), Column("Device-hours", 4, "right"), Column("Cost", 4, "right"))


def flavor_table_forms(
    request: Request, rows: Iterable[FlavorPlan], dataset_tokens: float | None, price: float | None
) -> list[Table]:
    """The table of all accelerators, from the form with everything to the one for narrow terminals.

    A `*` marks the accelerator of the request.
    """
    bill_columns = () if dataset_tokens is None else BILL_COLUMNS[: 2 if price is None else 3]
    cells = []
    for row in rows:
        mark = "*" if row.flavor == request.flavor else " "
        cells.append(
            (
                f"{mark} {row.flavor.name}",
                row.devices_text,
                *_plan_cells(request, row),
                *([] if dataset_tokens is None else _bill_cells(row, dataset_tokens, price)),
            )
        )
    full = Table((*FLAVOR_COLUMNS, *bill_columns), tuple(cells))
    short = full.shortened("Memory per device", "Memory")
    tight = short.tightened()
    # Where nothing fits, the plan's cell says so.
    two_lines = tight.without("Fits").wrapped(2)
    no_mfu = two_lines.without("MFU")
    no_percent = no_mfu.shortened("Memory", "Memory", without_percent)
    three_lines = no_percent.wrapped(3)
    no_device_hours = three_lines.without("Device-hours")
    no_memory = no_device_hours.without("Memory")
    least = no_memory.without("Devices")
    return [full, short, tight, two_lines, no_mfu, no_percent, three_lines, no_device_hours, no_memory, least]


def _plan_cells(request: Request, row: FlavorPlan) -> tuple[str, ...]:
    if row.best is None:
        return ("no", row.problem or "", "-", "-", "-")
    memory = memory_text(request.on_flavor(row.flavor), row.best)
    return ("yes", plan_text(row.best.plan), memory, f"{row.tokens_per_second:,.0f}", percent_text(row.best.mfu))


def _bill_cells(row: FlavorPlan, dataset_tokens: float, price: float | None) -> tuple[str, ...]:
    whole = bill(row, dataset_tokens, price)
    if whole is None:
        return ("-",) * (2 if price is None else 3)
    amounts = (whole.hours, whole.device_hours, whole.cost)
    return tuple(amount_text(amount) for amount in amounts if amount is not None)


def amount_text(amount: float) -> str:
    """Hours or money, with three digits or more."""
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:,.1f}" if amount >= 10 else f"{amount:.3g}"


def recommendation(rows: tuple[FlavorPlan, ...], dataset_tokens: float | None, price: float | None) -> list[str]:
    """The recommended accelerators with reasons, a sentence each; empty if no plan fits on any."""
    best_value, quickest = cheapest(rows), fastest(rows)
    if best_value is None or quickest is None:
        return []
    rate = f"{best_value.tokens_per_device_second:,.0f} tokens/s on each device"
    whole = None if dataset_tokens is None else bill(best_value, dataset_tokens, price)
    if whole is None:
        reason = f"it needs the fewest device-hours: {rate}"
    elif whole.cost is None:
        reason = f"it needs the fewest device-hours, {amount_text(whole.device_hours)}: {rate}"
    else:
        reason = f"it costs least, {amount_text(whole.cost)}: {rate}"
    if best_value is quickest:
        return [f"Recommended: {best_value.flavor.name}; {reason}, and none is faster."]
    sentences = [f"Recommended: {best_value.flavor.name}; {reason}."]
    lowest_rate = (1 - NEAR_OPTIMAL) * best_value.tokens_per_device_second
    near_optimal = fastest(row for row in rows if row.tokens_per_device_second >= lowest_rate)
    if near_optimal is not None and near_optimal not in (best_value, quickest):
        sentences.append(f"Almost as good: {near_optimal.flavor.name}; {_compared(near_optimal, best_value)}.")
    return [*sentences, f"The fastest: {quickest.flavor.name}; {_compared(quickest, best_value)}."]


def _compared(row: FlavorPlan, best_value: FlavorPlan) -> str:
    speedup = row.tokens_per_second / best_value.tokens_per_second
    share = best_value.tokens_per_device_second / row.tokens_per_device_second - 1
    hours = f"for {share:.1%} more device-hours" if share <= 1 else f"for {1 + share:.1f} times the device-hours"
    return f"{speedup:.2f} times as fast, {hours}"


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
    best_value, quickest = cheapest(rows), fastest(rows)
    return {
        "dataset_tokens": dataset_tokens,
        "price_per_device_hour": price,
        "flavors": flavors,
        "cheapest": best_value and best_value.flavor.name,
        "fastest": quickest and quickest.flavor.name,
        "recommendation": recommendation(rows, dataset_tokens, price),
        "message": None if best_value else no_flavor_text(request, rows),
    }


def no_flavor_text(request: Request, rows: tuple[FlavorPlan, ...]) -> str:
    """The reason why there is no recommendation, and a remedy."""
    device = request.device
    if all(row.smallest_bytes is None for row in rows):
        return f"no accelerator can be used: {rows[-1].problem} ({rows[-1].flavor.name}): give fewer restrictions"
    smallest = min(row.smallest_bytes for row in rows if row.smallest_bytes is not None)
    remedies = (
        [f"--memory-percent {ceil(100 * smallest / device.memory_bytes)}"] if smallest <= device.memory_bytes else []
    )
    remedies.append("a smaller batch or length")
    if request.constraints.max_context == 1:
        remedies.append("a larger --max-context")
    if constraints_text(request.constraints):
        remedies.append("fewer restrictions")
    return (
        f"no accelerator is large enough: the smallest plan needs {gib(smallest)} on its fullest device, and "
        f"{device.name} leaves {gib(request.limit_bytes)}: give {', or '.join(remedies)}"
    )
