"""Hypothesis strategies that several tests share, and the profile under which they all run."""

from __future__ import annotations

import string
from typing import Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kms.limits import MAX_GROUP_NAME_BYTES, MAX_VERSION

PROFILE: Final = "kms"
settings.register_profile(
    PROFILE,
    deadline=None,
    max_examples=60,
    # A function-scoped fixture of ours is a directory or a constant; sharing it between examples is meant.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

_LETTERS_AND_DIGITS = string.ascii_letters + string.digits

new_names: SearchStrategy[str] = st.builds(
    lambda first, rest: first + rest,
    st.sampled_from(_LETTERS_AND_DIGITS),
    st.text(st.sampled_from(_LETTERS_AND_DIGITS + "._-"), max_size=63),
)
"""Names that may be given to a group made here."""

stored_names: SearchStrategy[str] = st.text(st.characters(codec="utf-8"), min_size=1, max_size=MAX_GROUP_NAME_BYTES).filter(
    lambda name: bool(name.strip()) and len(name.encode()) <= MAX_GROUP_NAME_BYTES
)
"""Names that a keystore may hold."""

versions: SearchStrategy[int] = st.integers(1, 12) | st.integers(1, MAX_VERSION)
aads: SearchStrategy[bytes] = st.binary(max_size=64)
plaintexts: SearchStrategy[bytes] = st.binary(max_size=300)


@st.composite
def splits(draw: st.DrawFn, stream: bytes) -> list[bytes]:
    """`stream` cut into pieces anywhere."""
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
