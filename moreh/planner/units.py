"""Formats quantities: GiB, seconds, percent."""

GIB = 2**30


def gib(num_bytes: float) -> str:
    """Bytes in GiB, with one decimal from 10 GiB on and two below.

    >>> gib(3 * 2**30), gib(64 * 2**30)
    ('3.00 GiB', '64.0 GiB')
    """
    value = num_bytes / GIB
    return f"{value:,.1f} GiB" if value >= 10 else f"{value:.2f} GiB"


def seconds_text(seconds: float, step_s: float | None = None) -> str:
    """Seconds with two decimals, or milliseconds where the time is below a second.

    >>> seconds_text(0.0421), seconds_text(53.71), seconds_text(0.3, step_s=2.0)
    ('42.10 ms', '53.71 s', '0.30 s')

    Args:
        step_s: Seconds of the whole step, to give all parts of a step the unit of the step itself.
    """
    return f"{seconds:,.2f} s" if (seconds if step_s is None else step_s) >= 1 else f"{seconds * 1000:,.2f} ms"


def percent_text(fraction: float) -> str:
    """A fraction (0 to 1) in percent, with one decimal."""
    return f"{100 * fraction:.1f}%"
