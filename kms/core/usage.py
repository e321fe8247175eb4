"""What is known of the use of a KEK version, as plain data: for the file it is kept in, and for those who ask.

Only operations that succeeded are counted. One that moves a ciphertext counts twice: the version that opened it has one
more `ReEncryptFrom`, the version that sealed it anew one more `ReEncryptTo`. Times are whole seconds since 1970.
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct, field

_MOST: Final = (1 << 63) - 1

Count = Annotated[int, Meta(ge=0, le=_MOST)]
EpochSeconds = Annotated[int, Meta(ge=-_MOST, le=_MOST)]
"""Of a migrated version, the time it was made may be any 64-bit number."""
Name = Annotated[str, Meta(min_length=1, max_length=64)]
"""Of a principal."""

OTHERS: Final = "(others)"
"""Counts for principals beyond those that are told apart; none can have this name."""


class Operations(Struct, rename="pascal", omit_defaults=True, gc=False):
    """How often a version did what."""

    encrypt: Count = 0
    decrypt: Count = 0
    generate_data_key: Count = 0
    re_encrypt_from: Count = 0
    re_encrypt_to: Count = 0


class Refusals(Struct, rename="camel", gc=False):
    """How often a principal was refused a version, and when last."""

    requests: Count
    last_epoch_sec: EpochSeconds


class TimedDisable(Struct, rename="camel", omit_defaults=True, gc=False):
    """A version is, or was, disabled for a time; `ended_epoch_sec` is None until it is over.

    `refused` are the principals whose ciphertexts named the version meanwhile. That is what a ciphertext's header says;
    whether the rest of it would have opened, only the key could tell.
    """

    by: Name
    since_epoch_sec: EpochSeconds
    until_epoch_sec: EpochSeconds
    refused: dict[Name, Refusals] = field(default_factory=dict)
    ended_epoch_sec: EpochSeconds | None = None


class VersionUsage(Struct, rename="camel", omit_defaults=True, kw_only=True, gc=False):
    """How a version was used since it was counted: what was not, is left out. `last_used_by` is a principal's name."""

    since_epoch_sec: EpochSeconds
    operations: Operations
    last_used_epoch_sec: EpochSeconds | None = None
    last_used_by: Name | None = None
    timed_disable: TimedDisable | None = None
