"""Spans of time, as people say them."""

from __future__ import annotations

import pytest

from kms.core.spans import exact_length, length


@pytest.mark.parametrize(
    ("seconds", "about", "exactly"),
    [
        (0, "0 seconds", "0 seconds"),
        (1, "1 second", "1 second"),
        (59, "59 seconds", "59 seconds"),
        (60, "1 minute", "1 minute"),
        (298, "4 minutes", "4 minutes 58 seconds"),
        (7200, "2 hours", "2 hours"),
        (5400, "1 hour", "1 hour 30 minutes"),
        (86_400 + 1, "1 day", "1 day 1 second"),
        (30 * 86_400, "30 days", "30 days"),
    ],
)
def test_a_span_is_told_about_and_exactly(seconds: int, about: str, exactly: str) -> None:
    assert (length(seconds), exact_length(seconds)) == (about, exactly)
