"""Who is at the other end of a Unix socket."""

from __future__ import annotations

import socket
import struct
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from kms.limits import NOBODY_ID

_UCRED: Final = struct.Struct("=iII")
"""struct ucred of unix(7)."""


class Credentials(NamedTuple):
    """The process that connected, as the kernel vouches for it (unix(7), SO_PEERCRED); the gid is its primary group's."""

    pid: int
    uid: int
    gid: int


def credentials_of(sock: socket.socket) -> Credentials:
    """Whose process connected the Unix socket `sock`. Raises `OSError` where the kernel does not say."""
    return Credentials._make(_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


@cache
def overflow_uid() -> int:
    """The uid that stands for each one that this user namespace has no number for (user_namespaces(7))."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return NOBODY_ID
