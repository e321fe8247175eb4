"""The client-facing ciphertext: which key, then the envelope under it.

    02 version | N, 1 byte (1..255) | N bytes of UTF-8 group name | KEK version, 8 bytes big-endian | inner envelope

The kek_id travels inside the ciphertext, so a rotation strands nothing. It is not secret, and it needs no
authentication of its own: changed, it names another key, under which the envelope does not open.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from kms.core.envelope import OVERHEAD_BYTES
from kms.errors import DecryptionFailedError
from kms.limits import MAX_GROUP_NAME_BYTES, MAX_VERSION

FORMAT: Final = 2


class Ciphertext(NamedTuple):
    """A ciphertext taken apart. `envelope` is not yet verified."""

    group: str
    version: int
    envelope: bytes


def header(group: str, version: int) -> bytes:
    """What stands in front of every envelope under this key. Raises `ValueError` for an impossible name or number.

    No ciphertext can hold a name of more than 255 bytes, which a migrated keystore may have. Its header has the length 0,
    so that it is like no other's, and nothing that `group` would read.
    """
    name = group.encode("utf-8")
    if not name:
        raise ValueError("a group name is not empty")
    if not 1 <= version <= MAX_VERSION:
        raise ValueError("a version is 1 to 2^63-1")
    return bytes((FORMAT, len(name) if len(name) <= MAX_GROUP_NAME_BYTES else 0)) + name + version.to_bytes(8, "big")


def header_of(blob: bytes) -> bytes:
    """What `header` made, of a ciphertext that was just made or opened here. Of any other it may be anything."""
    return blob[: blob[1] + 10]


def version_of(blob: bytes) -> int:
    """The version in `header_of`, with the same reservation."""
    start = 2 + blob[1]
    return int.from_bytes(blob[start : start + 8], "big")


def parse(blob: bytes) -> Ciphertext:
    """Take a ciphertext apart; raises `DecryptionFailedError` for anything that is not one."""
    name, version = kek_id(blob)
    return Ciphertext(name, version, blob[10 + blob[1] :])


def kek_id(blob: bytes) -> tuple[str, int]:
    """Only the group and the version that it names; raises what `parse` raises."""
    return group(blob), version_of(blob)


def group(blob: bytes) -> str:
    """Only the group's name, for who has to decide before anything is opened; raises what `parse` raises."""
    if len(blob) < 2 or blob[0] != FORMAT:
        raise DecryptionFailedError
    name_bytes = blob[1]
    if name_bytes == 0 or len(blob) < 2 + name_bytes + 8 + OVERHEAD_BYTES:
        raise DecryptionFailedError
    try:
        return blob[2 : 2 + name_bytes].decode("utf-8")
    except UnicodeDecodeError:
        raise DecryptionFailedError from None
