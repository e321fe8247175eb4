"""The `MasterKeyProvider` over the keyring in this process's memory."""

from __future__ import annotations

from kms.core.ciphertext import Ciphertext, Purpose
from kms.core.kek import Kek
from kms.core.names import NO_SUCH_GROUP
from kms.core.provider import KeyringHolder
from kms.errors import DecryptionFailedError, InvalidRequestError
from kms.host.entropy import random_key


class LocalMasterKeyProvider:
    """Seals and opens with whatever keyring is current. It reads `current` once for each use: no lock, no await."""

    def __init__(self, holder: KeyringHolder) -> None:
        self._holder = holder
        with random_key() as key:
            self._nobodys = Kek(key)

    def seal(self, group: str, plaintext: bytes, aad: bytes, purpose: Purpose) -> bytes:
        """A ciphertext 03 under the group's ACTIVE version; raises `InvalidRequestError` for an unknown group."""
        found = self._holder.current.groups.get(group)
        if found is None or found.active.key is None:
            raise InvalidRequestError(NO_SUCH_GROUP)
        if not found.active.kek_id[0]:
            raise InvalidRequestError("keyId: no ciphertext can hold a name of more than 255 bytes; use another key group")
        return found.active.key.seal(plaintext, aad, purpose, found.active.kek_id)

    def open(self, sealed: Ciphertext, aad: bytes, only_of: str | None = None) -> bytes:
        """The plaintext; raises `DecryptionFailedError` whatever is wrong, also when its group is not `only_of`."""
        found = self._holder.current.groups.get(sealed.group)
        version = None if found is None else found.versions.get(sealed.version)
        if version is not None and version.key is not None and version.decrypts and only_of in (None, sealed.group):
            return version.key.open(sealed, aad)
        # Opened under a key that nobody has: how long a refusal takes does not tell an unknown, disabled or destroyed
        # version from a wrong tag.
        self._nobodys.open(sealed, aad)
        raise DecryptionFailedError
