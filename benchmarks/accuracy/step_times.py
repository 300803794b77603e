"""The measured seconds of a step, from whichever figure a row gives."""

import math
import re

from published_programs import RunRow, cell, measurement

from moreh.planner.plan.plan import Training


def step_time_s(row: RunRow, training: Training, units: int, peak_flops_per_second: float) -> float | None:
    """Seconds of a step, from the first published figure that tells them; None without one.

    Args:
        units: Devices as the row counts them.
        peak_flops_per_second: Peak FLOP/s of such a unit, for utilization.
    """
    seconds = None
    if step := measurement(row, "step_time_s"):
        seconds = step
    elif rate := measurement(row, "tok_s_per_gpu"):
        seconds = training.tokens / (rate * units)
    elif rate := measurement(row, "tok_s_total"):
        seconds = training.tokens / rate
    elif samples := measurement(row, "samples_s_total"):
        seconds = training.global_batch_size / samples
    elif tflops := measurement(row, "tflops_per_gpu"):
        flops = counted_flops(training, cell(row, "tflops_counts"))
        seconds = None if flops is None else flops / (tflops * 1e12 * units)
    elif utilization := measurement(row, "mfu_pct"):
        share = utilization / 100 if utilization > 1 else utilization
        seconds = (counted_flops(training, "model") or 0.0) / (share * peak_flops_per_second * units)
    # A rate of 1e-320 or 1e308 is a number too.
    return seconds if seconds is not None and 0 < seconds < math.inf else None


def counted_flops(training: Training, counts: str) -> float | None:
    """FLOPs of a step as a row counts them; None for words that are not known.

    Without words, they are the model's: 6 for each weight of a matmul and token, and attention over all positions, as
    in appendix B of https://arxiv.org/abs/2204.02311.
    """
    model = training.architecture
    hidden, layers = model.hidden, len(model.layers)
    if "96BsLh" in counts or "incl. full recompute" in counts:
        # Equation 3 of arXiv:2104.04473
        terms = 1 + training.sequence_length / (6 * hidden) + model.vocabulary / (16 * layers * hidden)
        return 96 * training.tokens * layers * hidden**2 * terms
    if counts and not re.search(r"model|\b6 ?n", counts.lower()):
        return None
    weights = hidden * model.vocabulary
    attention = 0
    for layer, count in model.layer_kinds():
        weights += count * sum(linear.inputs * linear.outputs * linear.active for linear in layer.linears)
        attention += count * 12 * layer.heads * layer.head_dim * training.sequence_length
    return float(training.tokens * (6 * weights + attention))
