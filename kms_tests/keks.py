"""Ciphertexts without a server: sealed under a KEK, or under none."""

from __future__ import annotations

import os

from kms.core import ciphertext
from kms.core.ciphertext import Purpose
from kms.core.envelope import COMMITTING_PREFIX, EnvelopeKey
from kms.core.kek import Kek
from kms.core.keyring import KeyGroup, KeySlot, KeyVersion, VersionStatus
from kms.core.specs import AES_256, KeySpec


def sealed(
    kek: Kek,
    plaintext: bytes = b"x",
    aad: bytes = b"",
    *,
    group: str = "billing",
    version: int = 1,
    purpose: Purpose = Purpose.ENCRYPT,
) -> bytes:
    """A ciphertext 03."""
    return kek.seal(plaintext, aad, purpose, ciphertext.kek_id(group, version))


def opened(kek: Kek, blob: bytes, aad: bytes = b"") -> bytes:
    """The plaintext of a ciphertext 02 or 03."""
    return kek.open(ciphertext.parse(blob), aad)


def group_of(
    name: str, versions: dict[int, KeyVersion], *, created_at: int = 0, uuid: bytes | None = None, spec: KeySpec = AES_256
) -> KeyGroup:
    """A key group whose versions are made already."""
    active = next(version for version in versions.values() if version.status is VersionStatus.ACTIVE)
    return KeyGroup(name, uuid or os.urandom(16), spec, spec.uses[0], created_at, active, versions)


def slot(group: str = "default", version: int = 1, uuid: bytes = bytes(16), spec: KeySpec = AES_256) -> KeySlot:
    """Where a key belongs, of a group that has no random UUID."""
    return KeySlot(group, uuid, spec, version)


def earlier_header(kek_id: bytes) -> bytes:
    """What a ciphertext 02 begins with, which nothing but the tests makes any more; the plain envelope follows it."""
    return b"\x02" + kek_id


def sealed_earlier(
    key: EnvelopeKey, plaintext: bytes, aad: bytes = b"", *, group: str = "billing", version: int = 1
) -> bytes:
    """A ciphertext 02; `key` has the bytes of the KEK."""
    return key.seal(plaintext, aad, earlier_header(ciphertext.kek_id(group, version)))


def forged(group: str, version: int, purpose: Purpose = Purpose.ENCRYPT, *, size: int = 32) -> bytes:
    """What has the form of a ciphertext 03 with a plaintext of `size` bytes, and opens under no key."""
    header = ciphertext.header(purpose, ciphertext.kek_id(group, version))
    return header + COMMITTING_PREFIX + bytes(24 + size + 16 + 32)
