"""The journal on disk: lines appended durably, and what could not be written taken back."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from kms.host.streams import write_all_at
from kms.storage.content import exchanged
from kms.storage.journal import mac_of


class SyncError(OSError):
    """The fsync of what was written failed: whether it is there after a power cut is not known."""


class JournalFile:
    """A journal at its path, to be appended to. Blocking; one thread at a time."""

    def __init__(self, path: Path, length: int, last: str, *, torn: int = 0) -> None:
        """It has `length` bytes that count, and `torn` behind them; `last` is the MAC of its last line."""
        self.path: Final = path
        self.length = length
        self.last = last
        self._is_torn = torn > 0
        self._size = length + torn
        self._descriptor = -1

    def append(self, line: bytes) -> None:
        """Write `line` durably.

        Raises `OSError` when nothing has happened, `SyncError` when it may have, and `KeystoreReplacedError` when what is
        at the path is another file by now.
        """
        self._open()
        self._cut()
        self._is_torn, self._size = True, -1
        try:
            write_all_at(self._descriptor, line, self.length)
        except OSError:
            # Left for the next one where that fails too: a beginning of a line is none.
            with contextlib.suppress(OSError):
                self._cut()
            raise
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            # A second fsync would succeed, though what this one could not write is gone: who starts next must not find it.
            with contextlib.suppress(OSError):
                self._cut()
            raise SyncError(error.errno, error.strerror, str(self.path)) from error
        self.length += len(line)
        self.last = mac_of(line)
        self._is_torn, self._size = False, self.length

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            # What was written was fsynced: there is nothing more that could be lost.
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _open(self) -> None:
        """Make sure that what is open is what is at the path, and is as it was left."""
        if self._descriptor < 0:
            flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                self._descriptor = os.open(self.path, flags)
            except FileNotFoundError:
                raise exchanged(self.path, "removed") from None
        ours = os.fstat(self._descriptor)
        try:
            there = os.lstat(self.path)
        except FileNotFoundError:
            raise exchanged(self.path, "removed") from None
        if not os.path.samestat(ours, there) or not stat.S_ISREG(ours.st_mode):
            raise exchanged(self.path, "exchanged")
        if self._size >= 0 and ours.st_size != self._size:
            raise exchanged(self.path, "changed")

    def _cut(self) -> None:
        if self._is_torn:
            os.ftruncate(self._descriptor, self.length)
            self._is_torn, self._size = False, self.length
