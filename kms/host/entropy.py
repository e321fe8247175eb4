"""Fresh random secrets from the operating system, drawn straight into a buffer that can be wiped."""

from __future__ import annotations

import ctypes
import os

from kms.core.secret import Secret
from kms.host.libc import LIBC
from kms.limits import KEY_BYTES


def random_secret(length: int) -> Secret:
    """`length` (at most 256) random bytes.

    getentropy(3) instead of `os.urandom`: the latter returns an immutable `bytes`, a copy of the key that nobody can wipe.
    """
    buffer = bytearray(length)
    target = (ctypes.c_char * length).from_buffer(buffer)
    if LIBC.getentropy(target, ctypes.c_size_t(length)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return Secret(buffer)


def random_key() -> Secret:
    """A fresh 256-bit key."""
    return random_secret(KEY_BYTES)
