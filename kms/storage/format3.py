"""Keystore format 3, of the first releases in Python. Read only: what is saved is format 4.

    {formatVersion: 3, generation, kdf: {name, version, memoryKiB, iterations, parallelism, salt}, rootCheck,
     keyGroups: [{keyId, createdAtEpochSec, activeVersion, versions: [{version, status, createdAtEpochSec, wrappedKek}]}],
     mac}

The MAC is verified over the deterministic encoding of everything else before any other field than the key derivation's is
looked at. Each KEK is wrapped with AES-256-GCM, its group and version authenticated with it.
"""

from __future__ import annotations

import hmac
from types import TracebackType
from typing import Final, Literal, Self

import msgspec
from msgspec import Struct

from kms.core import derive
from kms.core.envelope import EnvelopeKey
from kms.core.keyring import Keyring, KeySlot
from kms.core.secret import Secret
from kms.errors import DecryptionFailedError, WrongPassphraseError
from kms.storage.stored import (
    WRONG_PASSPHRASE,
    Kdf,
    StoredGroup,
    StoredVersion,
    Wrap,
    build_keyring,
    check_mac,
    decode_json,
    from_text,
    stored_group,
)

FORMAT: Final = 3
_ROOT_CHECK: Final = b"mini-kms/root-check/v3"
_LABEL_WRAP: Final = "mini-kms/v3/wrap-kek"
_LABEL_CHECK: Final = "mini-kms/v3/root-check"
_LABEL_MAC: Final = "mini-kms/v3/keystore-mac"


class _Version(Struct, forbid_unknown_fields=True, rename="camel"):
    version: int
    status: str
    created_at_epoch_sec: int
    wrapped_kek: str | None


class _Group(Struct, forbid_unknown_fields=True, rename="camel"):
    key_id: str
    created_at_epoch_sec: int
    active_version: int
    versions: list[_Version]


class _Body(Struct, forbid_unknown_fields=True, rename="camel"):
    """Everything that the MAC covers, in its order."""

    format_version: Literal[3]
    generation: int
    kdf: Kdf
    root_check: str
    key_groups: list[_Group]


class _Document(_Body, rename="camel"):
    mac: str


_decoder: Final = msgspec.json.Decoder(_Document)


class Keys:
    """The sub-keys of a root key that a file of format 3 is under."""

    def __init__(self, root: Secret) -> None:
        """Derive them; `root` is not kept, and the caller should wipe it."""
        self._mac = derive.sub_key(root, _LABEL_MAC)
        with derive.sub_key(root, _LABEL_WRAP) as wrap, derive.sub_key(root, _LABEL_CHECK) as check:
            self._wrap = EnvelopeKey(wrap)
            self._check = EnvelopeKey(check)

    def is_right(self, root_check: bytes) -> bool:
        """Whether `root_check` was sealed under this root key."""
        try:
            return self._check.open(root_check, b"") == _ROOT_CHECK
        except DecryptionFailedError:
            return False

    def mac(self, message: bytes) -> bytes:
        """HMAC-SHA256, 32 bytes."""
        with self._mac.view() as key:
            return hmac.digest(key, message, "sha256")

    def unwrap(self, slot: KeySlot, wrapped: bytes) -> Secret:
        """The KEK of this slot; raises `DecryptionFailedError` for one that was wrapped for another."""
        name = slot.group.encode("utf-8")
        bound = len(name).to_bytes(4, "big") + name + slot.version.to_bytes(8, "big")
        return self._wrap.open_secret(wrapped, bound)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._mac.wipe()
        self._wrap.wipe()
        self._check.wipe()


class Sealed:
    """A format 3 file that is parsed and not yet believed; see `kms.storage.stored.Opener`."""

    version: Final = FORMAT

    def __init__(self, raw: bytes) -> None:
        """Raises `KeystoreError` when `raw` is not of the format, or asks for an impossible key derivation."""
        self._document = decode_json(raw, _decoder)
        self.header = self._document.kdf.header()
        self._root_check = from_text(self._document.root_check)
        self.notes: list[str] = []

    def authenticate(self, root: Secret) -> int:
        """The generation."""
        with Keys(root) as keys:
            return self._authenticated(keys)

    def open(self, root: Secret, rewrap: Wrap) -> Keyring:
        """The keyring; its groups get the UUIDs here that the format did not know."""
        with Keys(root) as keys:
            generation = self._authenticated(keys)
            return build_keyring(generation, map(_stored, self._document.key_groups), keys.unwrap, rewrap)

    def _authenticated(self, keys: Keys) -> int:
        document = self._document
        if not keys.is_right(self._root_check):
            raise WrongPassphraseError(WRONG_PASSPHRASE)
        body = _Body(document.format_version, document.generation, document.kdf, document.root_check, document.key_groups)
        check_mac(keys.mac(msgspec.json.encode(body)), document.mac)
        return document.generation


def _stored(group: _Group) -> StoredGroup:
    versions = [StoredVersion(v.version, v.status, v.created_at_epoch_sec, v.wrapped_kek) for v in group.versions]
    return stored_group(group.key_id, group.created_at_epoch_sec, group.active_version, versions)
