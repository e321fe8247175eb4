"""The client-facing ciphertext: which key, then the envelope under it.

    03 version | purpose, 1 byte | N, 1 byte (1..255) | N bytes of UTF-8 group name | KEK version, 8 bytes big-endian
       | committing envelope (`kms.core.envelope`)
    02 version | N, 1 byte (1..255) | N bytes of UTF-8 group name | KEK version, 8 bytes big-endian | plain envelope

The KEK's id travels inside the ciphertext, so a rotation strands nothing. It is not secret. What is written is 03, whose
header is authenticated with the caller's AAD. That of 02, which earlier releases wrote, and which opens for ever, is not:
changed, it names another key, under which the envelope does not open.

The purpose says which operation made it, so that what somebody encrypted is never taken for a data key. No field of a
request sets it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from kms.core.envelope import COMMITTING_OVERHEAD_BYTES, COMMITTING_PREFIX, OVERHEAD_BYTES, PREFIX
from kms.errors import DecryptionFailedError
from kms.limits import MAX_GROUP_NAME_BYTES, MAX_VERSION

FORMAT: Final = 3
EARLIER_FORMAT: Final = 2
_LENGTH_BYTES: Final = 8
_NONE: Final = bytes(_LENGTH_BYTES)
_VERSION_BYTES: Final = 8
_OVERHEAD_BYTES: Final = _VERSION_BYTES + COMMITTING_OVERHEAD_BYTES
_EARLIER_OVERHEAD_BYTES: Final = _VERSION_BYTES + OVERHEAD_BYTES
_SHORTEST: Final = EARLIER_FORMAT + 1 + _EARLIER_OVERHEAD_BYTES


class Purpose(IntEnum):
    """Which operation made a ciphertext."""

    UNKNOWN = 0
    """It was re-encrypted from one that did not say."""
    ENCRYPT = 1
    DATA_KEY = 2
    DATA_KEY_PAIR = 3


_PURPOSES: Final = tuple(Purpose)
"""Each at the place of its number. Not a mapping: to hash an enum's member takes as long as the rest of this."""
_UNKNOWN: Final = Purpose.UNKNOWN
_BEGINNINGS: Final = tuple(bytes((FORMAT, purpose)) for purpose in _PURPOSES)
_EARLIER: Final = bytes((EARLIER_FORMAT,))


class Ciphertext(NamedTuple):
    """A ciphertext taken apart. `envelope` is not yet verified, nor is anything else; `header` is all before it."""

    group: str
    version: int
    envelope: bytes
    purpose: Purpose
    header: bytes

    @property
    def is_bound(self) -> bool:
        """Whether the envelope is a committing one, and its header authenticated."""
        return self.header[0] == FORMAT

    @property
    def plaintext_bytes(self) -> int:
        """How long its plaintext is."""
        return len(self.envelope) - (COMMITTING_OVERHEAD_BYTES if self.is_bound else OVERHEAD_BYTES)


def kek_id(group: str, version: int) -> bytes:
    """A KEK's id as every ciphertext under it has it. Raises `ValueError` for an impossible name or number.

    No ciphertext can hold a name of more than 255 bytes, which a migrated keystore may have. Its id has the length 0, so
    that it is like no other's, and nothing that `group` would read.
    """
    name = group.encode("utf-8")
    if not name:
        raise ValueError("a group name is not empty")
    if not 1 <= version <= MAX_VERSION:
        raise ValueError("a version is 1 to 2^63-1")
    length = len(name) if len(name) <= MAX_GROUP_NAME_BYTES else 0
    return bytes((length,)) + name + version.to_bytes(_VERSION_BYTES, "big")


def header(purpose: Purpose, kek: bytes) -> bytes:
    """What a ciphertext under the KEK of this id begins with; the committing envelope follows it."""
    return _BEGINNINGS[purpose] + kek


def bound(header: bytes, aad: bytes) -> bytes:
    """What a committing envelope authenticates: its ciphertext's header and the caller's AAD, each after its length."""
    return with_length(header) + with_length(aad)


def with_length(octets: bytes) -> bytes:
    """Some bytes after their number, which takes eight."""
    return len(octets).to_bytes(_LENGTH_BYTES, "big") + octets if octets else _NONE


def is_one(blob: bytes) -> bool:
    """Whether it begins as a ciphertext does."""
    return blob[:1] == _EARLIER or blob[:2] in _BEGINNINGS


def kek_id_of(blob: bytes) -> bytes:
    """The `kek_id` in a ciphertext that was just made or opened here. Of any other it may be anything."""
    # In 03 the purpose stands between.
    start = blob[0] - 1
    return blob[start : start + blob[start] + 9]


def version_of(blob: bytes) -> int:
    """The version in a ciphertext, with the same reservation."""
    start = blob[0] + blob[blob[0] - 1]
    return int.from_bytes(blob[start : start + _VERSION_BYTES], "big")


def parse(blob: bytes) -> Ciphertext:
    """Take a ciphertext apart; raises `DecryptionFailedError` for anything that is not one."""
    name = group(blob)
    start = blob[0]
    number = start + blob[start - 1]
    end = number + _VERSION_BYTES
    envelope = blob[end:]
    # No key is to see an envelope of the other kind.
    if start == FORMAT:
        if envelope[:2] != COMMITTING_PREFIX:
            raise DecryptionFailedError
        purpose = _PURPOSES[blob[1]]
    else:
        if envelope[:2] != PREFIX:
            raise DecryptionFailedError
        purpose = _UNKNOWN
    return Ciphertext(name, int.from_bytes(blob[number:end], "big"), envelope, purpose, blob[:end])


def named(blob: bytes) -> tuple[str, int]:
    """Only the group and the version that it names; raises what `parse` raises."""
    return group(blob), version_of(blob)


def group(blob: bytes) -> str:
    """Only the group's name, for who has to decide before anything is opened; raises what `parse` raises."""
    length = len(blob)
    if length < _SHORTEST:
        raise DecryptionFailedError
    # The number of each format is that of the bytes before the name.
    start = blob[0]
    if start == FORMAT:
        overhead = _OVERHEAD_BYTES
        if blob[1] >= len(_PURPOSES):
            raise DecryptionFailedError
    elif start == EARLIER_FORMAT:
        overhead = _EARLIER_OVERHEAD_BYTES
    else:
        raise DecryptionFailedError
    name_bytes = blob[start - 1]
    if name_bytes == 0 or length < start + name_bytes + overhead:
        raise DecryptionFailedError
    try:
        return blob[start : start + name_bytes].decode()
    except UnicodeDecodeError:
        raise DecryptionFailedError from None
