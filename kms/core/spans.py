"""Spans of time in words, as people say them."""

from __future__ import annotations

from typing import Final

_UNITS: Final = ((24 * 3600, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def length(seconds: int) -> str:
    """About how long: `3 hours`, for anything from 3 to less than 4."""
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds >= size), _UNITS[-1])
    return _counted(seconds // size, unit)


def exact_length(seconds: int) -> str:
    """How long to the second: `1 hour 30 minutes`."""
    parts = []
    for size, unit in _UNITS:
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(_counted(count, unit))
    return " ".join(parts) or _counted(0, _UNITS[-1][1])


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
