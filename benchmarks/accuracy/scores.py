"""Scores of errors, intervals and rankings, as figures and as lines of text."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np

from accuracy.blind import SHOTS, BlindRun, Group

# A sweep compares plans of the same training on the same devices. With fewer plans there is nothing to rank.
MIN_PLANS_IN_SWEEP = 3


def kendall_tau(predicted: Sequence[float], measured: Sequence[float], spread: float = 0.0) -> float:
    """Kendall's tau of two rankings over the pairs that differ by measurement: 1 if all agree, 0 without such a pair.

    Args:
        spread: The relative difference up to which measured figures are tied.
    """
    agree = pairs = 0
    for (p, m), (q, n) in combinations(zip(predicted, measured, strict=True), 2):
        if max(m, n) > min(m, n) * (1 + spread):
            pairs += 1
            agree += ((p > q) - (p < q)) * ((m > n) - (m < n))
    return agree / pairs if pairs else 0.0


def regret(predicted: Sequence[float], measured: Sequence[float], spread: float = 0.0) -> float:
    """Slowdown of the plan predicted to be the fastest against the fastest plan, as a fraction; 0 if they tie."""
    chosen = min(range(len(predicted)), key=lambda i: predicted[i])
    loss = measured[chosen] / min(measured) - 1
    return loss if loss > spread else 0.0


def spread_of_repeats(entries: Sequence[BlindRun]) -> float | None:
    """The largest relative difference between runs of the same plan; None if no plan was run twice."""
    repeats: dict[object, list[float]] = {}
    for entry in entries:
        assert entry.run.step_time_s is not None
        repeats.setdefault((entry.run.training, entry.run.plans, entry.run.cluster), []).append(entry.run.step_time_s)
    spreads = [max(times) / min(times) - 1 for times in repeats.values() if len(times) > 1]
    return max(spreads) if spreads else None


def percent(value: float) -> str:
    """A fraction as a cell of a table; empty for NaN."""
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def row_of_scores(name: str, groups: Sequence[Group]) -> str:
    """The scores of groups together, as a row of a table in Markdown."""
    entries = [entry for group in groups for entry in group.zero_shot]
    errors = np.array([entry.error for entry in entries])
    cells = [
        name,
        str(len(entries)),
        percent(float(np.mean(np.abs(errors)))),
        percent(float(np.median(np.abs(errors)))),
        percent(float(np.quantile(np.abs(errors), 0.9))),
        f"{100 * np.mean(errors):+.1f}",
        f"{100 * np.mean([entry.covered for entry in entries]):.0f}",
    ]
    for shots in SHOTS:
        drawn = [group for group in groups if shots in group.errors]
        error = covered = math.nan
        if drawn:
            # The mean of each draw over all runs, and the median over draws.
            error = float(np.median(np.nanmean(np.abs(np.hstack([group.errors[shots] for group in drawn])), axis=1)))
            covered = float(np.nanmean(np.hstack([group.covered[shots] for group in drawn])))
        cells += [percent(error), "" if math.isnan(covered) else f"{100 * covered:.0f}"]
    return f"| {' | '.join(cells)} |"


def score_lines(groups: Sequence[Group]) -> Iterable[str]:
    """A table in Markdown: a row for each group, and one for all. Empty without a group."""
    if not groups:
        return
    shots = "".join(f" {k} measured: mean | covered |" for k in SHOTS)
    yield f"| program, devices | rows | mean | median | 90th percentile | bias | covered |{shots}"
    yield "|---|" + "---|" * (6 + 2 * len(SHOTS))
    for group in groups:
        yield row_of_scores(", ".join(group.name), [group])
    yield row_of_scores("all", groups)


def sweep_lines(groups: Sequence[Group]) -> Iterable[str]:
    """A table in Markdown of how well the plans of each sweep are ranked."""
    yield "| sweep | plans | spread of repeats | Kendall's tau | regret |"
    yield "|---|---|---|---|---|"
    everything = [entry for group in groups for entry in group.zero_shot]
    sweeps: dict[str, list[BlindRun]] = {}
    for entry in everything:
        sweeps.setdefault(entry.run.sweep, []).append(entry)
    for name, entries in sweeps.items():
        if len({entry.run.plans for entry in entries}) < MIN_PLANS_IN_SWEEP:
            continue
        known = spread_of_repeats(entries)
        spread = known or 0.0
        predicted = [entry.seconds for entry in entries]
        measured = [entry.run.step_time_s or math.nan for entry in entries]
        tau, loss = kendall_tau(predicted, measured, spread), regret(predicted, measured, spread)
        text = "none repeated" if known is None else f"{spread:.1%}"
        yield f"| {name} | {len(entries)} | {text} | {tau:.2f} | {loss:.1%} |"


def error_line(name: str, errors: Iterable[float | None]) -> str | None:
    """Count, median, mean and maximum of absolute errors and their mean with sign, in percent; None without errors."""
    known = [error for error in errors if error is not None]
    if not known:
        return None
    absolute = [abs(error) * 100 for error in known]
    figures = (statistics.median(absolute), statistics.fmean(absolute), max(absolute), statistics.fmean(known) * 100)
    return f"{name:42} {len(known):5} {figures[0]:9.1f} {figures[1]:9.1f} {figures[2]:9.1f} {figures[3]:+9.1f}"
