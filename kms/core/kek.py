"""A key-encryption key as the data plane uses it: it seals ciphertext 03, and opens 03 and 02.

What is committing runs under a sub-key of its own, never under the key itself. Not for tidiness: XAES-256 begins by
encrypting the zero block, and that is the authentication key of AES-GCM under the same key, which 02 uses.
"""

from __future__ import annotations

from typing import Final

from kms.core import ciphertext
from kms.core.ciphertext import Ciphertext, Purpose
from kms.core.derive import sub_key
from kms.core.envelope import CommittingKey, EnvelopeKey
from kms.core.secret import Secret

_LABEL: Final = "mini-kms/v3/kek/xaes-256-gcm-kc"


class Kek:
    """A 256-bit key-encryption key. Its bytes live only in OpenSSL's contexts."""

    __slots__ = ("_committing", "_earlier", "_fronts")

    def __init__(self, key: Secret) -> None:
        """`key` is 32 bytes, which the caller should wipe."""
        self._earlier = EnvelopeKey(key)
        with sub_key(key, _LABEL) as derived:
            self._committing = CommittingKey(derived)
        self._fronts: list[tuple[bytes, bytes] | None] = [None] * len(Purpose)
        """For each purpose the header that was sealed under last, and its part of what is authenticated."""

    def seal(self, plaintext: bytes, aad: bytes, purpose: Purpose, kek_id: bytes) -> bytes:
        """A ciphertext 03 of the KEK of this id, which it is, to which and to `purpose` it is bound."""
        front = self._fronts[purpose]
        if front is None or not front[0].endswith(kek_id):
            header = ciphertext.header(purpose, kek_id)
            self._fronts[purpose] = front = (header, ciphertext.with_length(header))
        header, bound = front
        return self._committing.seal(plaintext, bound + ciphertext.with_length(aad), header)

    def open(self, sealed: Ciphertext, aad: bytes) -> bytes:
        """The plaintext; raises `DecryptionFailedError` whatever is wrong."""
        header = sealed.header
        if header[0] == ciphertext.FORMAT:
            return self._committing.open(sealed.envelope, ciphertext.bound(header, aad))
        return self._earlier.open(sealed.envelope, aad)

    def wipe(self) -> None:
        """Free the contexts. The key cannot be used afterwards."""
        self._earlier.wipe()
        self._committing.wipe()

    def __repr__(self) -> str:
        return "<Kek>"
