"""How many guesses a passphrase withstands at most."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core.strength import WEAK_BITS, bits, time_to_guess


@pytest.mark.parametrize(
    "weak", ["", "a", "hunter2", "aaaaaaaaaaaaaaaaaaaa", "1234567890", "abababababab", "abcdefghijkl", "20261127"]
)
def test_what_repeats_itself_or_is_short_is_weak(weak: str) -> None:
    assert bits(weak) < WEAK_BITS


@pytest.mark.parametrize("good", ["correct horse battery staple", "tR9!xq2#Lm", "\ud55c\uae00 \uc554\ud638 \ubb38\uad6c"])
def test_several_words_are_not_weak(good: str) -> None:
    assert bits(good) >= WEAK_BITS


@given(st.text(), st.characters())
def test_a_character_more_never_makes_one_weaker(text: str, more: str) -> None:
    assert bits(text + more) >= bits(text)


def test_the_time_is_told_in_the_unit_that_fits() -> None:
    assert [time_to_guess(number) for number in (1, 27, 37, 43, 51)] == [
        "at once",
        "in 2 minutes at the most",
        "in 38 hours at the most",
        "in 102 days at the most",
        "in 71 years at the most",
    ]
