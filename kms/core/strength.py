"""How many guesses a passphrase can withstand at most: enough to tell a person that one is weak, never that it is strong.

An upper bound, from what can be seen without a dictionary: the kinds of characters, repetition, and runs such as `abcd`
and `4321`. Words and dates make real ones weaker. Who has a copy of the keystore can guess as fast as the key derivation
lets machines; the server cannot slow that down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

_OTHER_CHARACTERS: Final = 100
"""Of each script beyond ASCII: about what somebody uses who writes it."""
_MEMBERS: Final = {"lower": 26, "upper": 26, "digit": 10, "mark": 33, "other": _OTHER_CHARACTERS}
_FORESEEN_BITS: Final = 1.0
"""Of a character that goes on as those before it did."""
GUESSES_PER_SECOND: Final = 1_000_000
"""What a thousand graphics cards make of Argon2id at the usual costs."""
WEAK_BITS: Final = 50
"""Below it those cards are through within 36 years."""


def bits(characters: Iterable[str]) -> float:
    """The binary logarithm of the number of guesses that find a passphrase of these characters, at most."""
    kinds: set[str] = set()
    free, foreseen = 0, 0
    previous = 0
    pairs: set[tuple[int, int]] = set()
    for character in characters:
        code = ord(character)
        kinds.add(_kind(character))
        if previous and (abs(code - previous) <= 1 or (previous, code) in pairs):
            foreseen += 1
        else:
            free += 1
        pairs.add((previous, code))
        previous = code
    alphabet = sum(_MEMBERS[kind] for kind in kinds)
    return free * math.log2(max(alphabet, 2)) + foreseen * _FORESEEN_BITS


def _kind(character: str) -> str:
    if not character.isascii():
        return "other"
    if character.isdigit():
        return "digit"
    if character.isalpha():
        return "lower" if character.islower() else "upper"
    return "mark"


_SPANS: Final = ((365.25 * 24 * 3600, "years"), (24 * 3600, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


def time_to_guess(bits_at_most: float) -> str:
    """How long that takes at `GUESSES_PER_SECOND`, in words: `in 3 days at the most`."""
    seconds = 2**bits_at_most / GUESSES_PER_SECOND
    size, unit = next(((size, unit) for size, unit in _SPANS if seconds >= 2 * size), (1, "seconds"))
    count = round(seconds / size)
    return f"in {count} {unit} at the most" if count else "at once"
