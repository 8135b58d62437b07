"""What comes from files that anybody may have written, made fit for a page: texts without surprises, real numbers."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

LONGEST_TEXT = 2000


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a number that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def clean(value: Any) -> str:
    """Return a value as text that every browser and drawing can hold: no control characters, not endless."""
    text = "".join(" " if c in "\t\n\r" else c if c.isprintable() else "�" for c in str(value)[:LONGEST_TEXT])
    return text + ("…" if len(str(value)) > LONGEST_TEXT else "")


def cleaned(value: Any) -> Any:
    """Return JSON with all its texts clean."""
    if isinstance(value, dict):
        return {clean(name): cleaned(each) for name, each in value.items()}
    if isinstance(value, list):
        return [cleaned(each) for each in value]
    return clean(value) if isinstance(value, str) else value
