"""Whose process may be shown a token: asked of the kernel for each new connection, before the first byte is sent.

While no server listens, anybody on the machine can take its port, or make a socket where its own would be. Who is
there is known by the user its process runs as:

- this process's own user, and root;
- over a Unix socket also the owner of the directory in which it was named: nobody else could have made it there, or
  the owner let them;
- the user whom the caller names as the server's.

Everybody else is refused, and so is who cannot be known: one in another network namespace, behind a forwarded port, or
with the overflow id, which stands for every user that a user namespace has no number for.
"""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Final

from kms.errors import ConfigError, ServerUnreachableError, UnknownServerError
from kms.host.peer import credentials_of, overflow_uid
from kms.host.sock_diag import far_end_of
from kms.limits import MAX_UNIX_ID

ANY: Final = "any"
"""In the place of a user: whoever answers is believed."""
_ROOT: Final = 0
_PAUSES: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Seconds between two questions; a server takes a connection up within its round. The last goes on."""


class KnownServer:
    """The rule by which one client knows its server."""

    def __init__(self, user: str | int | None = None) -> None:
        """`user` is the name or the uid of one more who may be it, or `any`. Raises `ConfigError` when there is none."""
        self.is_anybody: Final = user == ANY
        self._uids: Final = {os.geteuid(), _ROOT}
        if user is not None and not self.is_anybody:
            self._uids.add(_uid(user))

    def check_unix(self, link: socket.socket, path: str) -> None:
        """Return if the socket `link`, connected to `path`, leads to a known user's process, else `UnknownServerError`."""
        if self.is_anybody:
            return
        try:
            uid = credentials_of(link).uid
        except OSError as error:
            raise _unknown(path, f"the kernel does not say whose process it is ({error.strerror})") from error
        if self._knows(uid):
            return
        try:
            # The directory as it was named: behind a symbolic link in /tmp may be anybody's.
            owner = Path(path).parent.stat().st_uid
        except OSError:
            owner = -1
        if uid != owner or uid == overflow_uid():
            raise _unknown(path, _whose(uid))

    def is_tcp_known(self, link: socket.socket, address: str) -> bool:
        """Whether `link`, connected over loopback TCP, leads to a known user's process.

        False while nobody has taken the connection up: ask again. Raises `UnknownServerError` for anybody else's,
        `OSError` for a connection that broke.
        """
        if self.is_anybody:
            return True
        near, far = link.getsockname()[:2], link.getpeername()[:2]
        try:
            end = far_end_of(link.family, near, far)
        except OSError as error:
            raise _unknown(address, f"the kernel does not say whose process it is ({error.strerror})") from error
        if end is None:
            raise _unknown(address, "it is no process of this machine, or in another network namespace")
        if not end.is_held:
            return False
        if not self._knows(end.uid):
            raise _unknown(address, _whose(end.uid))
        return True

    def _knows(self, uid: int) -> bool:
        return uid in self._uids and uid != overflow_uid()


def pauses() -> Iterator[float]:
    """Seconds to wait before each further question whether a TCP server is known."""
    yield from _PAUSES
    while True:
        yield _PAUSES[-1]


def has_not_spoken(link: socket.socket, address: str) -> None:
    """Return if nothing has come over `link`: a server never speaks first. Else `ServerUnreachableError`.

    What it said before it was asked would be taken for the reply to what it is asked then.
    """
    try:
        early = link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return
    except OSError as error:
        raise ServerUnreachableError(f"the connection to {address} broke: {error.strerror}; connect again") from error
    if early:
        raise UnknownServerError(f"what answers at {address} spoke before it was asked; it is no mini-kms server")
    raise ServerUnreachableError(
        f"the connection to {address} broke: the server closed it; connect again (is kms-server running?)"
    )


def loopback(host: str) -> str:
    """The address that `host` means: a numeric one of loopback, or `localhost`, which is 127.0.0.1. Else `ConfigError`.

    No name is looked up, since whoever answers for names would choose who is shown the token, and `localhost` may be
    ::1, where somebody else may listen.
    """
    if not isinstance(host, str):
        # A number would be an address, too.
        raise TypeError(f"host has to be str, not {type(host).__name__}")
    if host == "localhost":
        return "127.0.0.1"
    try:
        address = ip_address(host)
    except ValueError:
        raise ConfigError(_NOT_LOOPBACK) from None
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            raise ConfigError(_NOT_LOOPBACK)
        address = address.ipv4_mapped or address
    if not address.is_loopback:
        raise ConfigError(_NOT_LOOPBACK)
    return str(address)


_NOT_LOOPBACK: Final = "not a loopback address; the protocol is not encrypted, use 127.0.0.1, ::1 or a tunnel"


def _uid(user: str | int) -> int:
    if isinstance(user, bool) or not isinstance(user, (str, int)):
        raise TypeError(f"server_user has to be str or int, not {type(user).__name__}")
    if isinstance(user, int) or (user.isascii() and user.isdigit()):
        # The length first: a text of thousands of digits is no number for int().
        if isinstance(user, str) and len(user) > len(str(MAX_UNIX_ID)):
            raise ConfigError(f"the server's user: a uid is a number from 0 to {MAX_UNIX_ID}")
        uid = int(user)
        if not 0 <= uid <= MAX_UNIX_ID:
            raise ConfigError(f"the server's user: a uid is a number from 0 to {MAX_UNIX_ID}")
        return uid
    try:
        return pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        raise ConfigError("the server's user: there is no user of this name; give a name, a uid, or any") from None


def _whose(uid: int) -> str:
    if uid == overflow_uid():
        return f"its user has no number here ({uid}, the overflow id)"
    return f"it is a process of user {uid}"


def _unknown(address: str, reason: str) -> UnknownServerError:
    return UnknownServerError(
        f"no token was sent to what answers at {address}: {reason}. If that is the server, name its user with "
        "--server-user (any: whoever it is)"
    )
