"""Numbers as a reader sees them, the same on a page, in a table and in a terminal."""

from __future__ import annotations

import math

NONE = "–"  # a figure that does not exist


def fixed(value: float | None, digits: int) -> str:
    """With so many decimals; ``NONE`` for a number that does not exist (None, NaN)."""
    return NONE if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction in percent, without the sign of it."""
    return fixed(None if fraction is None else 100 * fraction, digits)


def signed(fraction: float | None) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return NONE if fraction is None or math.isnan(fraction) else f"{100 * fraction:+.2f}".replace("-", "−")


def is_loss(metric: str) -> bool:
    """The one figure that is no fraction, and better when it is less."""
    return metric.endswith("loss")


def unit(metric: str) -> str:
    """What a metric's heading ends with."""
    return "" if is_loss(metric) else ", %"


def metric_value(value: float, metric: str) -> str:
    """A figure of metrics.json: in percent, a loss as it is."""
    return f"{value:.4f}" if is_loss(metric) else percent(value)


def duration(seconds: float | None, none: str = NONE) -> str:
    """How long something took: in seconds, minutes or hours, whichever reads best."""
    if seconds is None:
        return none
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def clock(seconds: float) -> str:
    """How long something that is watched runs already: ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def three_digits(value: float) -> str:
    """Three digits that count, without a power of ten: 0.0800, 4.26, 306, 1234."""
    return f"{value:.{0 if value <= 0 else max(0, 2 - math.floor(math.log10(value)))}f}"


def large(number: float | None) -> str:
    """A count with three digits that matter: 544 k, 2.53 M, 180 M, 7.31 G."""
    if number is None:
        return NONE
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{three_digits(number / limit)} {letter}"
    return f"{number:.0f}"
