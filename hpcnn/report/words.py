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
