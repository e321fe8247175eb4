"""The file container MKE2: who can open it, then a stream of chunks, each of them authentic by itself and in its place.

    "MKE2" | R, 1 byte (1..16) | R times: length, 2 bytes big-endian, and a recipient
           | salt, 32 bytes | commitment, 32 bytes | chunks to the end of the file

A recipient is the file's data key, wrapped under a KEK: a ciphertext 03 of purpose DATA_KEY, with the caller's AAD. Of it,
salt and AAD come the key of the chunks and the commitment, so that each data key opens one content or nothing:

    commitment | key = HKDF-SHA256(data key, salt, "mini-kms/MKE2/64KiB" | 00 | AAD, 64 bytes)

Each chunk is 65,536 bytes, sealed into 16 more (`kms.core.envelope.ChunkSealer`); the last has 0 to 65,536, and 0 only in
an empty file. What each recipient is for is authenticated, but which there are is not: who moves a file to another key
never sees its data key. So whoever can write the file can take a recipient away, but not add one of another data key, and
not make any open to another content. Who knows the data key can make another body: it is shared by all who may decrypt.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from kms.core import ciphertext
from kms.core.ciphertext import Purpose
from kms.core.derive import hkdf_sha256
from kms.core.secret import Secret
from kms.errors import DecryptionFailedError, InputError
from kms.limits import COMMITMENT_BYTES, GCM_TAG_BYTES, KEY_BYTES, MAX_RECIPIENTS, MAX_WRAPPED_KEY_BYTES, STREAM_CHUNK_BYTES

MAGIC: Final = b"MKE2"
SALT_BYTES: Final = 32
SEALED_CHUNK_BYTES: Final = STREAM_CHUNK_BYTES + GCM_TAG_BYTES
_LENGTH_BYTES: Final = 2
_INFO: Final = b"mini-kms/MKE2/64KiB\x00"

Take = Callable[[int], bytes]
"""Reads so many bytes, or fewer at the end of the input."""


class Recipient(NamedTuple):
    """A wrapped data key, and the KEK that it is under."""

    wrapped: bytes
    group: str
    version: int


class Header(NamedTuple):
    """What stands before the chunks."""

    recipients: Sequence[Recipient]
    salt: bytes
    commitment: bytes

    def encode(self) -> bytes:
        """The bytes of it, with the magic ones. Raises `InputError` for recipients that no file may have."""
        _check(self.recipients)
        listed = b"".join(len(one.wrapped).to_bytes(_LENGTH_BYTES, "big") + one.wrapped for one in self.recipients)
        return MAGIC + bytes((len(self.recipients),)) + listed + self.salt + self.commitment


def read_header(take: Take) -> Header:
    """The header of the input whose magic bytes were read already. Raises `InputError` for what is none."""
    number = _whole(take, 1)[0]
    if not 1 <= number <= MAX_RECIPIENTS:
        raise InputError(_DAMAGED)
    recipients = []
    for _ in range(number):
        length = int.from_bytes(_whole(take, _LENGTH_BYTES), "big")
        if not 1 <= length <= MAX_WRAPPED_KEY_BYTES:
            raise InputError(_DAMAGED)
        recipients.append(recipient(_whole(take, length)))
    _check(recipients)
    return Header(recipients, _whole(take, SALT_BYTES), _whole(take, COMMITMENT_BYTES))


def recipient(wrapped: bytes) -> Recipient:
    """The recipient that `wrapped` is; raises `InputError` for what is no wrapped data key."""
    try:
        sealed = ciphertext.parse(wrapped)
    except DecryptionFailedError:
        raise InputError(_FOREIGN) from None
    if sealed.purpose is not Purpose.DATA_KEY or sealed.plaintext_bytes != KEY_BYTES:
        raise InputError(_FOREIGN)
    return Recipient(wrapped, sealed.group, sealed.version)


def keys(data_key: Secret, salt: bytes, aad: bytes) -> tuple[bytes, Secret]:
    """The commitment of a file, and the key of its chunks."""
    output = hkdf_sha256(data_key, salt=salt, info=_INFO + aad, length=COMMITMENT_BYTES + KEY_BYTES)
    commitment, key = bytes(output[:COMMITMENT_BYTES]), Secret(output[COMMITMENT_BYTES:])
    Secret(output).wipe()
    return commitment, key


def opened(header: Header, data_key: Secret, aad: bytes) -> Secret:
    """The key of the chunks; raises `DecryptionFailedError` when this is not the data key, or not the AAD, of this file."""
    commitment, key = keys(data_key, header.salt, aad)
    if len(data_key) != KEY_BYTES or not hmac.compare_digest(commitment, header.commitment):
        key.wipe()
        raise DecryptionFailedError
    return key


def _check(recipients: Sequence[Recipient]) -> None:
    if not 1 <= len(recipients) <= MAX_RECIPIENTS:
        raise InputError(f"a file has 1 to {MAX_RECIPIENTS} recipients")
    if len({(one.group, one.version) for one in recipients}) != len(recipients):
        raise InputError(_DAMAGED)


def _whole(take: Take, count: int) -> bytes:
    taken = take(count)
    if len(taken) != count:
        raise InputError("not a whole MKE2 file: it ends inside its header")
    return taken


_DAMAGED: Final = "not a whole MKE2 file: its header is damaged"
_FOREIGN: Final = "not an MKE2 file: its header holds something else than a data key"
