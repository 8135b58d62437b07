"""Numbers as people read them."""

from __future__ import annotations


def quantity(value: float | None, unit: str = "") -> str:
    """Return a number with three digits and a decimal prefix, and a dash for None: 61100840 -> "61.1 M"."""
    if value is None:
        return "–"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def number(value: float | None) -> str:
    """Return a number without powers of ten, and a dash for None: 16000.4 -> "16000", 0.5 -> "0.5"."""
    if value is None:
        return "–"
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e12 else f"{value:.3g}"


def milliseconds(seconds: float | None) -> str:
    """Return seconds as a number of milliseconds."""
    return number(None if seconds is None else 1e3 * seconds)


def percent(share: float | None) -> str:
    """Return a part of 1 as per cent."""
    return "–" if share is None else f"{100 * share:.1f}%"
