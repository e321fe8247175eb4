"""A lock between processes: a file, held by `flock` for as long as a descriptor of it is open.

The lock file is never unlinked: a process that waits on an unlinked one would come to hold a lock that nobody else
sees. It holds the pid of whoever holds it, for the message to the others.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from pathlib import Path
from typing import Final

_MOST_BYTES: Final = 16
"""A pid and a line end; what a crash has left of them may be anything, but not longer."""


class LockHeldError(Exception):
    """Another process has the lock; `holder` is its pid, or `unknown`."""

    def __init__(self, holder: str) -> None:
        super().__init__(f"held by process {holder}")
        self.holder = holder


def hold(path: Path) -> int:
    """Take the lock `path` (made with mode 0600 if missing) and return the descriptor that holds it until it is closed.

    Raises `LockHeldError` at once when another has it, `OSError` when the file cannot be made or written, or is none that
    this has made: whatever else has its name is not written to.
    """
    # O_NONBLOCK: opening a FIFO must not hang before its kind is known.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    try:
        state = os.fstat(descriptor)
        # A second name may be that of anything, such as what it is meant to lock.
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1 or state.st_size > _MOST_BYTES:
            raise _foreign()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockHeldError(_holder(descriptor)) from None
        if not is_held(path, descriptor):
            raise OSError(errno.EAGAIN, "it was exchanged just now; try again")
        pid = f"{os.getpid()}\n".encode("ascii")
        os.pwrite(descriptor, pid, 0)
        os.ftruncate(descriptor, len(pid))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_held(path: Path, descriptor: int) -> bool:
    """Whether the lock that `descriptor` holds is the one that all others would try for at `path`.

    It is not once somebody has removed the file: the next to come makes another, and holds that. Raises `OSError` when it
    cannot be looked at.
    """
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    found = re.match(rb"[0-9]+", os.pread(descriptor, _MOST_BYTES, 0))
    return found[0].decode("ascii") if found else "unknown"


def _foreign() -> OSError:
    return OSError(errno.EEXIST, "another file has its name; move it away")
