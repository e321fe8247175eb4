"""The inner envelope: AES-256-GCM. The only file in which AES runs.

    01 version | 01 algorithm (AES-256-GCM) | 12-byte nonce | ciphertext || 16-byte tag

The nonce is drawn fresh here for every seal and is never taken from a caller: two messages under one key and nonce
give away their XOR and the authentication key (NIST SP 800-38D, section 8). Random 96-bit nonces keep the chance of
a repeat below 2^-32 for 2^32 seals per key, which is the bound at which a key should have been rotated.

Every failure to open is the same `DecryptionFailedError`.
"""

from __future__ import annotations

import os
from typing import Final, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kms.core.secret import Secret
from kms.errors import DecryptionFailedError, InputError
from kms.limits import GCM_NONCE_BYTES, GCM_TAG_BYTES, KEY_BYTES, MAX_GCM_PLAINTEXT_BYTES

PREFIX: Final = b"\x01\x01"
HEADER_BYTES: Final = len(PREFIX) + GCM_NONCE_BYTES
OVERHEAD_BYTES: Final = HEADER_BYTES + GCM_TAG_BYTES
"""What an envelope is longer than its plaintext: 30 bytes."""

Buffer = bytes | bytearray | memoryview


class _Wiped:
    """In the place of a key that is gone: with it nothing can be sealed, and nothing opens."""

    def _refuse(self, *_: object) -> NoReturn:
        raise DecryptionFailedError

    encrypt = decrypt = decrypt_into = _refuse


class EnvelopeKey:
    """A 256-bit key, ready to seal and open. Its bytes live only in OpenSSL's context, which cleanses itself when freed."""

    __slots__ = ("_aead",)

    def __init__(self, key: Secret) -> None:
        """`key` is 32 bytes; OpenSSL copies it, and the caller should wipe it."""
        if len(key) != KEY_BYTES:
            raise ValueError("an AES-256 key has 32 bytes")
        with key.view() as view:
            self._aead: AESGCM | _Wiped = AESGCM(view)

    def seal(self, plaintext: Buffer, aad: Buffer, prefix: bytes = b"") -> bytes:
        """`prefix`, then the envelope of `plaintext`. `aad` is authenticated and not stored; empty is the same as none.

        `prefix` is written in front as it is, so that a caller's own header costs no further copy.
        """
        nonce = os.urandom(GCM_NONCE_BYTES)
        return prefix + PREFIX + nonce + self._aead.encrypt(nonce, plaintext, aad)

    def seal_with_nonce(self, nonce: bytes, plaintext: Buffer, aad: Buffer) -> bytes:
        """`seal` below its randomness, for known-answer tests; nothing else may call it."""
        return PREFIX + nonce + self._aead.encrypt(nonce, plaintext, aad)

    def open(self, envelope: Buffer, aad: Buffer) -> bytes:
        """The plaintext of `envelope`; raises `DecryptionFailedError` whatever is wrong with it."""
        if len(envelope) < OVERHEAD_BYTES or envelope[:2] != PREFIX:
            raise DecryptionFailedError
        try:
            return self._aead.decrypt(envelope[2:HEADER_BYTES], envelope[HEADER_BYTES:], aad)
        except InvalidTag:
            raise DecryptionFailedError from None

    def open_secret(self, envelope: Buffer, aad: Buffer) -> Secret:
        """`open` into a buffer that can be wiped; for keys."""
        if len(envelope) < OVERHEAD_BYTES or envelope[:2] != PREFIX:
            raise DecryptionFailedError
        buffer = bytearray(len(envelope) - OVERHEAD_BYTES)
        try:
            self._aead.decrypt_into(envelope[2:HEADER_BYTES], envelope[HEADER_BYTES:], aad, buffer)
        except InvalidTag:
            raise DecryptionFailedError from None
        return Secret(buffer)

    def wipe(self) -> None:
        """Free the context, which cleanses the key. The key cannot be used afterwards."""
        self._aead = _Wiped()

    def __repr__(self) -> str:
        return "<EnvelopeKey>"


class StreamSealer:
    """Seals one envelope piece by piece, in constant memory: `header`, then each `update_into`, then `finish`."""

    def __init__(self, key: Secret, aad: Buffer) -> None:
        self._nonce = os.urandom(GCM_NONCE_BYTES)
        with key.view() as view:
            self._gcm = Cipher(algorithms.AES256(view), modes.GCM(self._nonce)).encryptor()
        self._gcm.authenticate_additional_data(aad)
        self._total = 0

    @property
    def header(self) -> bytes:
        return PREFIX + self._nonce

    def update_into(self, piece: memoryview, output: bytearray) -> int:
        """Encrypt `piece` into the start of `output` (at least 15 bytes longer); returns how many bytes were written.

        Raises `InputError` past GCM's 64 GiB - 32 bytes.
        """
        self._total += len(piece)
        if self._total > MAX_GCM_PLAINTEXT_BYTES:
            raise InputError(
                "the file is larger than 64 GiB - 32 bytes, the most AES-GCM protects under one nonce; split it"
            )
        return self._gcm.update_into(piece, output)

    def finish(self) -> bytes:
        """The 16-byte tag that ends the envelope."""
        self._gcm.finalize()
        return self._gcm.tag


class StreamOpener:
    """Opens one envelope piece by piece. Nothing it returns may be believed before `finish` has passed."""

    def __init__(self, key: Secret, header: bytes, aad: Buffer) -> None:
        """`header` is the first 14 bytes of the envelope; raises `DecryptionFailedError` when it is not one."""
        if len(header) != HEADER_BYTES or header[:2] != PREFIX:
            raise DecryptionFailedError
        with key.view() as view:
            self._gcm = Cipher(algorithms.AES256(view), modes.GCM(header[2:])).decryptor()
        self._gcm.authenticate_additional_data(aad)
        self._total = 0

    def update_into(self, piece: memoryview, output: bytearray) -> int:
        """Decrypt `piece` into the start of `output` (at least 15 bytes longer); returns how many bytes were written."""
        self._total += len(piece)
        if self._total > MAX_GCM_PLAINTEXT_BYTES:
            raise DecryptionFailedError
        return self._gcm.update_into(piece, output)

    def finish(self, tag: bytes) -> None:
        """Verify the 16-byte tag; raises `DecryptionFailedError` when anything before it was altered."""
        try:
            self._gcm.finalize_with_tag(tag)
        except (InvalidTag, ValueError):
            raise DecryptionFailedError from None
