"""The `MasterKeyProvider` over the keyring in this process's memory."""

from __future__ import annotations

from kms.core.ciphertext import Ciphertext
from kms.core.provider import KeyringHolder
from kms.errors import DecryptionFailedError, InvalidRequestError


class LocalMasterKeyProvider:
    """Seals and opens with whatever keyring is current. It reads `current` once for each use: no lock, no await."""

    def __init__(self, holder: KeyringHolder) -> None:
        self._holder = holder

    def seal(self, group: str, plaintext: bytes, aad: bytes) -> bytes:
        """A client ciphertext under the group's ACTIVE version; raises `InvalidRequestError` for an unknown group."""
        found = self._holder.current.groups.get(group)
        if found is None or found.active.key is None:
            raise InvalidRequestError("keyId: no such key group")
        return found.active.key.seal(plaintext, aad, found.active.ciphertext_header)

    def open(self, ciphertext: Ciphertext, aad: bytes) -> bytes:
        """The plaintext; raises `DecryptionFailedError` whatever is wrong."""
        found = self._holder.current.groups.get(ciphertext.group)
        version = None if found is None else found.versions.get(ciphertext.version)
        if version is None or version.key is None or not version.decrypts:
            raise DecryptionFailedError
        return version.key.open(ciphertext.envelope, aad)
