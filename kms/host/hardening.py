"""Make this process one that nobody can look into, before it reads its first secret.

No core file (a core is a copy of every key), and not dumpable: another process of the same user can then neither
attach to it nor open its /proc/PID/mem (prctl(2), PR_SET_DUMPABLE). Memory is locked, so that keys are not swapped
out, where the limit allows. What is locked is not to grow: memory that was needed once is given back.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import Final

from kms.host.libc import LIBC
from kms.limits import READ_BYTES

_PR_SET_DUMPABLE: Final = 4
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4
_M_MMAP_THRESHOLD: Final = -3
_LARGE_BYTES: Final = READ_BYTES + 1024
"""Just above one read: those are taken and freed for each request, and would be mapped and unmapped each time."""


def forbid_dumps() -> None:
    """Core limit 0 and, on Linux, not dumpable. Raises `OSError` when the system refuses, which it has no reason to."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux" and LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")


def lock_memory() -> bool:
    """Keep this process out of swap; False where the limit (RLIMIT_MEMLOCK) does not allow it.

    Pages are locked when they are first touched (MCL_ONFAULT): without it every mapped library would be read in whole.
    Future pages are included, so it is not tried under a finite limit, where a later allocation could fail for it.
    """
    unlimited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
    if not unlimited and not _may_exceed_limits():
        return False
    return int(LIBC.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)) == 0


def give_memory_back() -> None:
    """Have the C library give each large block back to the system when it is freed.

    glibc stops doing so by itself (mallopt(3): the threshold is dynamic) once it has seen such blocks come and go. What
    a few hundred unfinished frames took would then stay with this process, and in locked memory, for good.
    """
    mallopt = getattr(LIBC, "mallopt", None)  # glibc's own
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def take_environment(name: str) -> bytearray | None:
    """The value of an environment variable in a buffer of its own, removed from the environment and overwritten there.

    Overwritten, since unsetting alone leaves the value readable in /proc/PID/environ. So is the interpreter's own copy,
    which `os.environ` made at its start: it is about to be dropped, and its memory would keep the secret until it is used
    again. A copy that somebody made through `os.environ` since is out of reach.
    """
    value = os.environb.get(name.encode())
    if value is None:
        return None
    taken = bytearray(value)
    getenv = LIBC.getenv
    getenv.restype = ctypes.c_void_p
    address = getenv(name.encode())
    if address:
        ctypes.memset(address, 0, len(value))
    del os.environ[name]
    # The interpreter shares bytes objects of length 0 and 1 among all who use them.
    if len(value) > 1:
        ctypes.memset(_contents(value), 0, len(value))
    return taken


def _contents(value: bytes) -> int:
    """The address of the bytes themselves (PyBytes_AsString)."""
    address = ctypes.pythonapi.PyBytes_AsString
    address.restype = ctypes.c_void_p
    address.argtypes = [ctypes.py_object]
    return int(address(value))


def _may_exceed_limits() -> bool:
    # CAP_IPC_LOCK (bit 14) lifts RLIMIT_MEMLOCK.
    try:
        with Path("/proc/self/status").open(encoding="ascii") as status:
            effective = next(line for line in status if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return False
    return bool(int(effective.split()[1], 16) >> 14 & 1)
