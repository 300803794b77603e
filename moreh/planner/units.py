"""Bytes, seconds and fractions as people read them."""

GIB = 2**30


def gib(amount: float) -> str:
    """Bytes in GiB, with more digits where there is little."""
    value = amount / GIB
    return f"{value:,.1f} GiB" if value >= 10 else f"{value:.2f} GiB"


def seconds_text(seconds: float, step_s: float | None = None) -> str:
    """Seconds with two decimals, or milliseconds if a step is shorter than a second.

    `step_s` is the step that `seconds` is a part of, so that all parts have one unit; None: `seconds` is a step itself.
    """
    step_s = seconds if step_s is None else step_s
    return f"{seconds:,.2f} s" if step_s >= 1 else f"{seconds * 1000:,.2f} ms"


def percent_text(fraction: float) -> str:
    """A fraction (0 to 1) in percent."""
    return f"{100 * fraction:.1f}%"
