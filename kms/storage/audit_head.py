"""The head of an audit log: a file of two slots that are written by turns, each in its place.

So it needs no space on a full disk, where a new file would; and of a write that a crash cuts short the other slot is
left, which names an earlier record. That is as good: a head never names more than what is durable.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from kms.errors import InputMissingError
from kms.host import durable
from kms.host.private import open_private
from kms.limits import AUDIT_HEAD_SLOT_BYTES, MAX_AUDIT_HEAD_BYTES

_BLANK: Final = b" " * (AUDIT_HEAD_SLOT_BYTES - 1) + b"\n"


class HeadFile:
    """The head file at `path`, to be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._slot = 0

    def write(self, slot: bytes) -> None:
        """Put `slot`, of AUDIT_HEAD_SLOT_BYTES, in the place of the older one, durably. Raises `OSError`."""
        if self._descriptor < 0 or not is_at(self._path, self._descriptor):
            self.close()
            # The first time a new file, whatever is there: of an earlier version it has but one line.
            durable.write_file(self._path, slot + _BLANK)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._slot = 1
            return
        if os.pwrite(self._descriptor, slot, self._slot * AUDIT_HEAD_SLOT_BYTES) < len(slot):
            raise OSError("only a part of it was taken")
        os.fsync(self._descriptor)
        self._slot = 1 - self._slot

    def close(self) -> None:
        """Let go of the file."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def head_path(path: Path) -> Path:
    """Where the head of the log at `path` is."""
    return path.with_name(f"{path.name}.head")


def read_head(path: Path) -> bytes | None:
    """The head file of the log at `path`, not verified; None when there is none. Raises what `open_private` raises."""
    try:
        descriptor = open_private(head_path(path))
    except InputMissingError:
        return None
    try:
        return read_at(descriptor, MAX_AUDIT_HEAD_BYTES, 0)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """`length` bytes from `offset` on, or as many as there are."""
    pieces = []
    while length and (piece := os.pread(descriptor, length, offset)):
        pieces.append(piece)
        length -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def is_at(path: Path, descriptor: int) -> bool:
    """Whether `descriptor` is of the file that is at `path`."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
