"""The two ways in: a loopback TCP socket and a Unix socket."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import trio

from kms.errors import ConfigError, FileAccessError
from kms.host import locking
from kms.host.private import check_shared_directory, make_private_directory
from kms.limits import ACCEPT_BACKLOG, DEFAULT_TCP_HOST
from kms.server.config import ServerConfig


class Endpoint(NamedTuple):
    """A listener, which transport it is (`tcp` or `unix`), and its address as people write it."""

    listener: trio.SocketListener
    transport: str
    address: str


@contextlib.contextmanager
def listening(config: ServerConfig) -> Iterator[list[Endpoint]]:
    """Listen on what is configured until the end of the block. Raises what `open_tcp` and `UnixListener` raise."""
    endpoints: list[Endpoint] = []
    with contextlib.ExitStack() as cleanup:
        if config.tcp_port is not None:
            tcp, port = open_tcp(config.tcp_port)
            cleanup.callback(tcp.socket.close)
            endpoints.append(Endpoint(tcp, "tcp", f"{DEFAULT_TCP_HOST}:{port}"))
        if config.unix_socket is not None:
            unix = UnixListener(config.unix_socket, config.unix_socket_gid)
            cleanup.callback(unix.remove)
            cleanup.callback(unix.listener.socket.close)
            endpoints.append(Endpoint(unix.listener, "unix", str(config.unix_socket)))
        yield endpoints


def open_tcp(port: int, flag: str = "--tcp-port") -> tuple[trio.SocketListener, int]:
    """A listener on 127.0.0.1 and its port; 0 asks for any free one. Raises `ConfigError`, which names `flag`.

    Only loopback: the protocol has no encryption of its own.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Without it a restart would wait for the old connections' TIME_WAIT to pass.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((DEFAULT_TCP_HOST, port))
        sock.listen(ACCEPT_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {DEFAULT_TCP_HOST}:{port}: {error.strerror}; choose another {flag}") from None
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock)), int(sock.getsockname()[1])


_SUN_PATH_BYTES: Final = 107
"""sockaddr_un holds 108 bytes on Linux, the last of them NUL."""


_LOCK_SUFFIX: Final = ".lock"


class UnixListener:
    """A listening Unix socket and its file, which `remove` takes away.

    Of mode 0600 in a private directory, so that only this user can connect; or, for a group, of mode 0660 in a directory
    which that group may enter and only this user write to.

    The lock `PATH.lock` is held from before the file is looked at until it is removed: of two servers that start at once
    and find the same stale file, the slower would otherwise remove what the faster has just bound.
    """

    def __init__(self, path: Path, gid: int | None = None) -> None:
        """Raises `ConfigError` when the path is too long or a live server's, `SecretFileError` for a directory not private.

        `gid` is the group that may connect, besides this user.

        A stale file of a dead server is removed, a live server's never.
        """
        if len(os.fsencode(path)) > _SUN_PATH_BYTES:
            raise ConfigError(f"--unix-socket: a socket's path has at most {_SUN_PATH_BYTES} bytes; choose a shorter one")
        if gid is None:
            make_private_directory(path.parent)
        else:
            check_shared_directory(path.parent, gid)
        self._path = path
        with contextlib.ExitStack() as unless_listening:
            self._lock = _hold_lock(path)
            unless_listening.callback(os.close, self._lock)
            sock = unless_listening.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                self._bind(sock)
                if gid is not None:
                    _open_to(path, gid)
                sock.listen(ACCEPT_BACKLOG)
                self._identity = _identity(path.lstat())
            except OSError as error:
                raise FileAccessError(f"cannot make the socket {path}: {error.strerror}") from error
            unless_listening.pop_all()
        self.listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))

    def _bind(self, sock: socket.socket) -> None:
        try:
            _bind_private(sock, self._path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            self._remove_stale()
            _bind_private(sock, self._path)

    def _remove_stale(self) -> None:
        if not stat.S_ISSOCK(self._path.lstat().st_mode):
            raise ConfigError(f"{self._path} exists and is not a socket; choose another --unix-socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            # A stuck server's backlog may be full: that is a server too, and no reason to wait for it.
            probe.settimeout(0)
            try:
                probe.connect(str(self._path))
            except BlockingIOError:
                pass
            except ConnectionRefusedError:
                self._path.unlink()
                return
        raise ConfigError(f"another server is listening on {self._path}; stop it, or choose another --unix-socket")

    def remove(self) -> None:
        """Remove the socket file, if it is still the one made here, and let the next server have its place."""
        with contextlib.suppress(OSError):
            if _identity(self._path.lstat()) == self._identity:
                self._path.unlink()
        os.close(self._lock)


def _hold_lock(path: Path) -> int:
    lock = Path(f"{path}{_LOCK_SUFFIX}")
    try:
        return locking.hold(lock)
    except locking.LockHeldError as error:
        raise ConfigError(
            f"another server, process {error.holder}, has {path}; stop it, or choose another --unix-socket"
        ) from None
    except OSError as error:
        raise FileAccessError(f"cannot lock {lock}: {error.strerror}") from error


def _open_to(path: Path, gid: int) -> None:
    # Before it listens, and the group first: the one it has from the start may not be the one that is meant. By its name,
    # as a socket's descriptor is not its file; nobody else may write to the directory. A server that is not let call chown
    # can do with its own group.
    try:
        if path.lstat().st_gid != gid:
            os.chown(path, -1, gid)
    except PermissionError:
        path.unlink()
        raise ConfigError(
            f"--unix-socket-group: a file may be given only to a group of one's own; add this user to the group {gid}"
        ) from None
    path.chmod(0o660)


def _identity(state: os.stat_result) -> tuple[int, int, int]:
    # The time too: a file system may give the number of a removed file to the next one made.
    return state.st_dev, state.st_ino, state.st_mtime_ns


def _bind_private(sock: socket.socket, path: Path) -> None:
    # The umask makes it 0600 from the instant it exists. Bound by the standard library, in this thread: trio's bind
    # hops to another, and a umask around that would race with whatever else makes files.
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(before)
