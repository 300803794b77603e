"""Prints plans, for moreh-plan and --plan-only.

`width` is the width of the output in characters; None stands for any.
"""

from collections.abc import Iterable

from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.planner.calibration.calibrate import Calibration
from moreh.planner.report.interval import interval_of, interval_text, memory_names_text
from moreh.planner.report.plan_rows import header_pairs, plan_table_forms
from moreh.planner.search.request import Request
from moreh.planner.search.search import SearchResult
from moreh.tables import draw_widest, wrap_line

NAME_WIDTH = 14


def print_pairs(pairs: Iterable[tuple[str, str]], width: int | None) -> None:
    """Print a word and a text in each line; the rest of a long text stands below its beginning."""
    for name, text in pairs:
        print(wrap_line(f"{name:{NAME_WIDTH}}{text}", width, indent=NAME_WIDTH))


def print_sentences(sentences: Iterable[str], width: int | None) -> None:
    """Print each sentence on its own line, or on several if it is long."""
    for sentence in sentences:
        print(wrap_line(sentence, width))


def print_plans(
    request: Request,
    result: SearchResult,
    width: int | None,
    idle: str = "",
    notes: Iterable[tuple[str, str]] = (),
    calibration: Calibration | None = None,
) -> None:
    """Print the planned training and the table of the best plans, of which there is at least one.

    `idle` says why some devices have nothing to do; empty where all have something to do. `notes` are more pairs of a
    word and a text. `calibration` is what measured steps say of the program.
    """
    environment = request.environment.with_devices(result.best[0].plan.devices)
    interval = interval_of(result.best[0], request.training, environment, calibration)
    pairs = [*header_pairs(request, result, idle), ("80% interval", f"plan 1: {interval_text(interval)}")]
    if request.device.efficiency_class != THIS_MACHINE:
        pairs.append(("Plan 1 memory", memory_names_text(result.best[0], request.device)))
    print_pairs([*pairs, *notes], width)
    print(draw_widest(plan_table_forms(request, result), width))
