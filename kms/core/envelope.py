"""The inner envelopes, which all that is encrypted here is in. The only file in which AES runs.

    01 version | 01 algorithm (AES-256-GCM) | 12-byte nonce | ciphertext || 16-byte tag
    01 version | 02 algorithm (XAES-256-GCM, committing) | 24-byte nonce | ciphertext || 16-byte tag | 32-byte commitment

The nonce is drawn fresh here for every seal and is never taken from a caller: two messages under one key and nonce
give away their XOR and the authentication key (NIST SP 800-38D, section 8). Random 96-bit nonces keep the chance of
a repeat below 2^-32 for 2^32 seals per key, which is the bound at which a key should have been rotated. What programs
encrypt is therefore under the second, with 192 bits of nonce, which nobody comes near; the first is for what is sealed
seldom: keys in the keystore, a file under a key of its own. What earlier releases made of the first opens for ever.

Every failure to open is the same `DecryptionFailedError`.
"""

from __future__ import annotations

import hmac
import os
from typing import Final, NoReturn
from weakref import WeakKeyDictionary

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kms.core.secret import Secret
from kms.errors import DecryptionFailedError, InputError
from kms.limits import (
    COMMITMENT_BYTES,
    GCM_NONCE_BYTES,
    GCM_TAG_BYTES,
    KEY_BYTES,
    MAX_BYTES_PER_SUBKEY,
    MAX_CHUNKS,
    MAX_GCM_PLAINTEXT_BYTES,
    MAX_SEALS_PER_SUBKEY,
    MAX_SUBKEYS_KEPT,
    MAX_SUBKEYS_KEPT_PER_KEY,
)

PREFIX: Final = b"\x01\x01"
HEADER_BYTES: Final = len(PREFIX) + GCM_NONCE_BYTES
OVERHEAD_BYTES: Final = HEADER_BYTES + GCM_TAG_BYTES
"""What an envelope is longer than its plaintext: 30 bytes."""

Buffer = bytes | bytearray | memoryview


class _Wiped:
    """In the place of a key that is gone: with it nothing can be sealed, and nothing opens."""

    def _refuse(self, *_: object) -> NoReturn:
        raise DecryptionFailedError

    encrypt = decrypt = decrypt_into = update = update_into = _refuse


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


COMMITTING_PREFIX: Final = b"\x01\x02"
_SECOND_HALF: Final = len(COMMITTING_PREFIX) + GCM_NONCE_BYTES
_COMMITTING_HEADER_BYTES: Final = _SECOND_HALF + GCM_NONCE_BYTES
COMMITTING_OVERHEAD_BYTES: Final = _COMMITTING_HEADER_BYTES + GCM_TAG_BYTES + COMMITMENT_BYTES
"""What a committing envelope is longer than its plaintext: 74 bytes."""

_BLOCK_BITS: Final = 128
_BLOCK_BYTES: Final = 16
_REDUCTION: Final = 0x87
"""What a bit that leaves the block comes back as: x^7 + x^2 + x + 1, the field of CMAC (NIST SP 800-38B)."""
_TWICE: Final = (1 << _BLOCK_BITS) + 1
"""Times a block, it is that block twice: of blocks as one number, one exclusive-or changes all."""
_THRICE: Final = (1 << 2 * _BLOCK_BITS) + _TWICE
_DERIVED_BYTES: Final = 3 * _BLOCK_BYTES
_WORK_BYTES: Final = _DERIVED_BYTES + _BLOCK_BYTES - 1
"""With the room that updating a cipher context asks for."""
_LABELS: Final = tuple(
    int.from_bytes(label.ljust(_BLOCK_BYTES, b"\0"), "big") for label in (b"\x00\x01X\x00", b"\x00\x02X\x00", b"XCMT")
)
_FIRST_COUNTER: Final = b"\x00\x01\x00\x01"
_SECOND_COUNTER: Final = b"\x00\x01\x00\x02"
_SEAL_BITS: Final = MAX_BYTES_PER_SUBKEY.bit_length() - MAX_SEALS_PER_SUBKEY.bit_length()
"""So many bytes, as a power of two, count as one more seal: then the bound of seals is the one of bytes, too."""


class _Subkey:
    """What the first half of a nonce makes of a key; `folded` is X1 xor K1, twice."""

    __slots__ = ("folded", "front", "gcm")

    def __init__(self, front: bytes, gcm: AESGCM, folded: int) -> None:
        self.front = front
        """What its envelopes begin with."""
        self.gcm = gcm
        self.folded = folded


class CommittingKey:
    """A 256-bit key for XAES-256-GCM with key commitment (C2SP; IACR ePrint 2025/758, as in AWS-LC).

    The first half of the 24-byte nonce derives a subkey, under which the second half is AES-GCM's nonce. The commitment is
    32 bytes that only this key makes of that nonce, so that nobody can make an envelope that opens under two keys.

    Deriving a subkey costs more than sealing little. So one first half, drawn at random, serves for up to 2^16 seals or
    2^36 bytes, while the second is drawn each time: for 2^50 seals under one key, two that share both halves are as likely
    as 2^34 * C(2^16, 2) * 2^-96 = 2^-31. And the subkeys of what opened last are kept: eight for each key, of 512 keys at
    most, and of what was authentic alone, as otherwise anybody's garbage would push them out.

    Its numbers are K1 and what is made of it, which cannot be zeroed, only let go. Not to be used by two threads at once.
    """

    __slots__ = ("__weakref__", "_asked", "_ecb", "_k1", "_kept", "_sealer", "_seals_left")

    def __init__(self, key: Secret) -> None:
        """`key` is 32 bytes; OpenSSL copies it, and the caller should wipe it."""
        if len(key) != KEY_BYTES:
            raise ValueError("an AES-256 key has 32 bytes")
        with key.view() as view:
            self._ecb: CipherContext | _Wiped = Cipher(algorithms.AES256(view), modes.ECB()).encryptor()  # noqa: S305 - XAES is made of it
        low = int.from_bytes(self._ecb.update(bytes(_BLOCK_BYTES)), "big") << 1
        self._k1 = low ^ (1 << _BLOCK_BITS | _REDUCTION) if low >> _BLOCK_BITS else low
        one, two, commitment = _LABELS
        self._asked = (self._k1 ^ one) << 2 * _BLOCK_BITS | (self._k1 ^ two) << _BLOCK_BITS | commitment
        """The three blocks that a subkey is made of, but for the nonce."""
        self._kept: dict[bytes, _Subkey] = {}
        """Those that opened last, the latest at the end."""
        self._sealer: _Subkey | None = None
        self._seals_left = 0

    def seal(self, plaintext: Buffer, aad: Buffer, prefix: bytes = b"") -> bytes:
        """`prefix`, then the committing envelope of `plaintext`. `aad` is authenticated and not stored."""
        subkey = self._sealer
        counted = 1 + (len(plaintext) >> _SEAL_BITS)
        self._seals_left -= counted
        if subkey is None or self._seals_left < 0:
            self._sealer = subkey = self._derived(COMMITTING_PREFIX + os.urandom(GCM_NONCE_BYTES))
            self._seals_left = MAX_SEALS_PER_SUBKEY - counted
        return prefix + self._sealed(subkey, os.urandom(GCM_NONCE_BYTES), plaintext, aad)

    def seal_with_nonce(self, nonce: bytes, plaintext: Buffer, aad: Buffer) -> bytes:
        """`seal` below its randomness, for known-answer tests; nothing else may call it."""
        first, second = nonce[:GCM_NONCE_BYTES], nonce[GCM_NONCE_BYTES:]
        return self._sealed(self._derived(COMMITTING_PREFIX + first), second, plaintext, aad)

    def open(self, envelope: bytes, aad: Buffer, into: bytearray | None = None) -> bytes:
        """The plaintext of `envelope`; raises `DecryptionFailedError` whatever is wrong with it.

        Tag and commitment are both looked at, whatever the other says, so that there is one refusal, and one time it takes.
        With `into`, which has the plaintext's length, it is put there and nothing is returned.
        """
        if len(envelope) < COMMITTING_OVERHEAD_BYTES or not envelope.startswith(COMMITTING_PREFIX):
            raise DecryptionFailedError
        front, second = envelope[:_SECOND_HALF], envelope[_SECOND_HALF:_COMMITTING_HEADER_BYTES]
        sealer = self._sealer
        is_sealers = sealer is not None and sealer.front == front
        subkey = (sealer if is_sealers else self._kept.get(front)) or self._derived(front)
        plaintext: bytes | None
        sealed = envelope[_COMMITTING_HEADER_BYTES:-COMMITMENT_BYTES]
        try:
            if into is None:
                plaintext = subkey.gcm.decrypt(second, sealed, aad)
            else:
                plaintext = b""
                subkey.gcm.decrypt_into(second, sealed, aad, into)
        except InvalidTag:
            plaintext = None
        blocks = subkey.folded ^ int.from_bytes(second + _FIRST_COUNTER + second + _SECOND_COUNTER, "big")
        commitment = self._ecb.update(blocks.to_bytes(2 * _BLOCK_BYTES, "big"))
        if not hmac.compare_digest(commitment, envelope[-COMMITMENT_BYTES:]) or plaintext is None:
            raise DecryptionFailedError
        if not is_sealers:
            self._keep(subkey)
        return plaintext

    def open_secret(self, envelope: bytes, aad: Buffer) -> Secret:
        """`open` into a buffer that can be wiped; for keys."""
        buffer = bytearray(max(0, len(envelope) - COMMITTING_OVERHEAD_BYTES))
        try:
            self.open(envelope, aad, buffer)
        except BaseException:
            buffer[:] = bytes(len(buffer))
            raise
        return Secret(buffer)

    def wipe(self) -> None:
        """Free the contexts, which cleanse key and subkeys. The key cannot be used afterwards."""
        self._ecb = _Wiped()
        self._k1 = self._asked = 0
        self._kept.clear()
        self._sealer = None

    def __repr__(self) -> str:
        return "<CommittingKey>"

    def _derived(self, front: bytes) -> _Subkey:
        made = bytearray(_WORK_BYTES)
        asked = self._asked ^ int.from_bytes(front[2:], "big") * _THRICE
        self._ecb.update_into(asked.to_bytes(_DERIVED_BYTES, "big"), made)
        key = made[:KEY_BYTES]
        gcm = AESGCM(key)
        folded = (self._k1 ^ int.from_bytes(made[KEY_BYTES:_DERIVED_BYTES], "big")) * _TWICE
        made[:], key[:] = _NOTHING, _NO_KEY
        return _Subkey(front, gcm, folded)

    def _sealed(self, subkey: _Subkey, second: bytes, plaintext: Buffer, aad: Buffer) -> bytes:
        blocks = subkey.folded ^ int.from_bytes(second + _FIRST_COUNTER + second + _SECOND_COUNTER, "big")
        commitment = self._ecb.update(blocks.to_bytes(2 * _BLOCK_BYTES, "big"))
        return subkey.front + second + subkey.gcm.encrypt(second, plaintext, aad) + commitment

    def _keep(self, subkey: _Subkey) -> None:
        kept, front = self._kept, subkey.front
        if not kept:
            _let_go_of_others(self)
        elif front in kept:
            del kept[front]
        kept[front] = subkey
        if len(kept) > MAX_SUBKEYS_KEPT_PER_KEY:
            del kept[next(iter(kept))]


_NOTHING: Final = bytes(_WORK_BYTES)
_NO_KEY: Final = bytes(KEY_BYTES)
_keepers: Final[WeakKeyDictionary[CommittingKey, None]] = WeakKeyDictionary()
"""The keys that may keep subkeys, in the order in which they began to."""


def _let_go_of_others(key: CommittingKey) -> None:
    """Let `key` keep subkeys, which another has to let go of where too many keep some."""
    _keepers.pop(key, None)
    _keepers[key] = None
    if len(_keepers) > MAX_SUBKEYS_KEPT // MAX_SUBKEYS_KEPT_PER_KEY:
        oldest = next(iter(_keepers))
        del _keepers[oldest]
        oldest._kept.clear()


class ChunkSealer:
    """Seals a stream chunk by chunk, each into 16 bytes more, with AES-256-GCM under one key that seals nothing else.

    A chunk's nonce is its number, in 11 bytes big-endian, and whether it is the last, in one: no chunk opens at another
    place, and no stream that was cut off (the construction STREAM of Hoang, Reyhanitabar, Rogaway and Vizár, 2015).
    """

    def __init__(self, key: Secret) -> None:
        """`key` is 32 bytes, which the caller should wipe."""
        with key.view() as view:
            self._aead = AESGCM(view)
        self._nonces = _ChunkNonces()

    def seal_into(self, chunk: memoryview, output: memoryview, *, is_last: bool) -> None:
        """Seal `chunk` into `output`, which is 16 bytes longer. Raises `InputError` past 2^36 chunks."""
        if not self._nonces.are_left:
            raise InputError("the file has more chunks than a stream holds; split it")
        self._aead.encrypt_into(self._nonces.next(is_last=is_last), chunk, None, output)


class ChunkOpener:
    """Opens what a `ChunkSealer` has sealed, in its order."""

    def __init__(self, key: Secret) -> None:
        """`key` is 32 bytes, which the caller should wipe."""
        with key.view() as view:
            self._aead = AESGCM(view)
        self._nonces = _ChunkNonces()

    def open_into(self, sealed: memoryview, output: memoryview, *, is_last: bool) -> None:
        """Open `sealed` into `output`, which is 16 bytes shorter; raises `DecryptionFailedError`."""
        if not self._nonces.are_left:
            raise DecryptionFailedError
        try:
            self._aead.decrypt_into(self._nonces.next(is_last=is_last), sealed, None, output)
        except InvalidTag:
            raise DecryptionFailedError from None


class _ChunkNonces:
    """The nonces of one stream, none of them twice."""

    def __init__(self) -> None:
        self._number = 0
        self._is_over = False

    @property
    def are_left(self) -> bool:
        return not self._is_over and self._number < MAX_CHUNKS

    def next(self, *, is_last: bool) -> bytes:
        nonce = self._number.to_bytes(GCM_NONCE_BYTES - 1, "big") + (b"\x01" if is_last else b"\x00")
        self._number += 1
        self._is_over = is_last
        return nonce


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
