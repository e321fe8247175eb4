"""A lock between processes: a file, held by `flock` for as long as a descriptor of it is open.

The lock file is never unlinked: a process that waits on an unlinked one would come to hold a lock that nobody else
sees. It holds the pid of whoever holds it, for the message to the others.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class LockHeldError(Exception):
    """Another process has the lock; `holder` is its pid, or `unknown`."""

    def __init__(self, holder: str) -> None:
        super().__init__(f"held by process {holder}")
        self.holder = holder


def hold(path: Path) -> int:
    """Take the lock `path` (made with mode 0600 if missing) and return the descriptor that holds it until it is closed.

    Raises `LockHeldError` at once when another has it, `OSError` when the file cannot be made or written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockHeldError(os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
