"""The file container MKE1: a wrapped data key, then the file under that data key.

    "MKE1" | length of the wrapped DEK, 4 bytes big-endian | wrapped DEK (a client ciphertext) | inner envelope of the file

The caller's AAD is the AAD of both. Re-wrapping the data key touches only the header; the body stays as it is.
"""

from __future__ import annotations

from typing import Final

from kms.core import ciphertext
from kms.core.ciphertext import Purpose
from kms.errors import DecryptionFailedError, InputError
from kms.limits import KEY_BYTES, MAX_WRAPPED_KEY_BYTES

MAGIC: Final = b"MKE1"
FIXED_BYTES: Final = len(MAGIC) + 4


def header(wrapped_key: bytes) -> bytes:
    """The container's header around `wrapped_key`; the file's envelope follows it."""
    if not 1 <= len(wrapped_key) <= MAX_WRAPPED_KEY_BYTES:
        raise InputError("the wrapped data key has an impossible length")
    return MAGIC + len(wrapped_key).to_bytes(4, "big") + wrapped_key


def wrapped_key_length(fixed: bytes) -> int:
    """From a container's first 8 bytes, how many bytes of wrapped data key follow; raises `InputError`."""
    if len(fixed) < FIXED_BYTES or fixed[:4] != MAGIC:
        raise InputError(
            "not an MKE1 file: it was not made by encrypt-file, or its beginning is lost; use decrypt for what encrypt made"
        )
    length = int.from_bytes(fixed[4:8], "big")
    if not 1 <= length <= MAX_WRAPPED_KEY_BYTES:
        raise InputError("not a whole MKE1 file: its header is damaged")
    return length


def is_wrapped_key(blob: bytes) -> bool:
    """Whether `blob` may be a wrapped data key: a ciphertext of 32 bytes that was not made for anything else.

    Any other ciphertext has no place in a header. One that somebody put there would be opened, or moved to another
    group, by whoever handles the file, for whom it need not be meant.
    """
    try:
        sealed = ciphertext.parse(blob)
    except DecryptionFailedError:
        return False
    return sealed.plaintext_bytes == KEY_BYTES and sealed.purpose in (Purpose.DATA_KEY, Purpose.UNKNOWN)
