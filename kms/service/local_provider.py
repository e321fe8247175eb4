"""The `MasterKeyProvider` over the keyring in this process's memory."""

from __future__ import annotations

from typing import Final

from kms.core.ciphertext import Ciphertext, Purpose
from kms.core.kek import Kek
from kms.core.keyring import KeyVersion, VersionStatus
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
        version = _NOBODY if found is None else found.versions.get(sealed.version, _NOBODY)
        may_open = version.decrypts and only_of in (None, sealed.group)
        # Otherwise under a key that nobody has, by the same steps: how long a refusal takes does not tell an unknown,
        # disabled or destroyed version from a wrong tag.
        key = version.key if may_open else self._nobodys
        if key is None:
            raise DecryptionFailedError
        plaintext = key.open(sealed, aad)
        if not may_open:
            raise DecryptionFailedError
        return plaintext


_NOBODY: Final = KeyVersion(0, VersionStatus.DISABLED, 0, None, None, b"")
"""In the place of a version that there is not."""
