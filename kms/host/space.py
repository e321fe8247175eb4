"""Space on a disk that is kept for a file before it is written."""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final

from kms.host.libc import LIBC

_KEEP_SIZE: Final = 1
"""FALLOC_FL_KEEP_SIZE: the file is as long as before. `os.posix_fallocate` would make it longer."""


def reserve(descriptor: int, offset: int, length: int) -> None:
    """Keep room for `length` bytes from `offset` on, so that writing them takes no more of the disk (fallocate(2)).

    Raises `OSError`: ENOSPC where there is none, EOPNOTSUPP or ENOSYS where the file system or the C library cannot.
    """
    # With 64-bit offsets on every platform; a C library that has no such name has them anyway.
    call: Any = getattr(LIBC, "fallocate64", None) or LIBC.fallocate
    if call(descriptor, _KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
