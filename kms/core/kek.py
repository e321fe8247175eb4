"""A key-encryption key as the data plane uses it: it seals ciphertext 03, and opens 03 and 02.

What is committing runs under a sub-key of its own, never under the key itself. Not for tidiness: XAES-256 begins by
encrypting the zero block, and that is the authentication key of AES-GCM under the same key, which 02 uses.
"""

from __future__ import annotations

from typing import Final

from kms.core import ciphertext
from kms.core.ciphertext import Ciphertext
from kms.core.derive import sub_key
from kms.core.envelope import CommittingKey, EnvelopeKey
from kms.core.secret import Secret

_LABEL: Final = "mini-kms/v3/kek/xaes-256-gcm-kc"


class Kek:
    """A 256-bit key-encryption key. Its bytes live only in OpenSSL's contexts."""

    __slots__ = ("_committing", "_earlier")

    def __init__(self, key: Secret) -> None:
        """`key` is 32 bytes, which the caller should wipe."""
        self._earlier = EnvelopeKey(key)
        with sub_key(key, _LABEL) as derived:
            self._committing = CommittingKey(derived)

    def seal(self, plaintext: bytes, aad: bytes, header: bytes) -> bytes:
        """A ciphertext 03 that begins with `header` (`kms.core.ciphertext.header`), to which it is bound."""
        return self._committing.seal(plaintext, ciphertext.bound(header, aad), header)

    def open(self, sealed: Ciphertext, aad: bytes) -> bytes:
        """The plaintext; raises `DecryptionFailedError` whatever is wrong."""
        if sealed.is_bound:
            return self._committing.open(sealed.envelope, ciphertext.bound(sealed.header, aad))
        return self._earlier.open(sealed.envelope, aad)

    def wipe(self) -> None:
        """Free the contexts. The key cannot be used afterwards."""
        self._earlier.wipe()
        self._committing.wipe()

    def __repr__(self) -> str:
        return "<Kek>"
