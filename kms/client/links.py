"""The connections of one blocking client: taken by one thread at a time, kept for the next, and never shared by accident.

- A connection belongs to whoever has taken it, until it is given back whole or dropped. Two exchanges on one connection
  would take each other's replies, which may be keys.
- One that has been idle is looked at before it is used again, and is not used at all after IDLE_SECONDS, which is less
  than a server keeps one: what is sent into a connection that is just being closed is neither done nor refused. For what
  may be asked again one is not looked at that was used a moment ago, as that takes a fifth of a call's time.
- After a fork the child begins anew, with a lock of its own, since the other may be held by a thread that it does not have.
  It closes what it inherited, without a shutdown: the connections go on, for its parent alone.
- Who has had a connection and cannot get one waits a while for a server that starts again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final

from kms.client.known_server import has_not_spoken
from kms.client.transport import closed
from kms.errors import ServerUnreachableError, UnknownServerError
from kms.limits import IDLE_SECONDS, MAX_CLIENT_CONNECTIONS, RECONNECT_SECONDS

Connect = Callable[[float], socket.socket]
"""Makes a connection within so many seconds, to a server that is known; raises `ServerUnreachableError` and others."""

_MOMENT: Final = 0.1
"""Seconds."""
_FIRST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 0.5


class Links:
    """Connections to one server. Threads may call all of it at the same time."""

    def __init__(
        self,
        address: str,
        connect: Connect | None,
        first: socket.socket,
        *,
        timeout: float,
        most: int = MAX_CLIENT_CONNECTIONS,
    ) -> None:
        """`first` is a connection that nothing was sent on yet. Without `connect` there is no other.

        A send or a receive on one that is taken waits for `timeout` seconds, and raises `BlockingIOError` then.
        """
        self._address = address
        self._timeout = timeout
        self._connect = connect
        self._most = most
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0
        self._process = os.getpid()
        self._is_closed = False
        self._new: socket.socket | None = self._prepared(first)
        self._idle: list[tuple[socket.socket, float]] = []
        self._taken: set[socket.socket] = set()
        self._under_way = 0
        _all.add(self)

    @property
    def has_others(self) -> bool:
        """Whether another connection can be made."""
        return self._connect is not None

    def take(self, deadline: float, *, anew: bool = False, looks: bool = True) -> socket.socket:
        """A connection for the caller alone, by `deadline` (`time.monotonic`); with `anew` one that was never used.

        Unless it `looks`, one that was used a moment ago may have ended since. Raises `ServerUnreachableError`, and what
        connecting raises.
        """
        if self._process != os.getpid():
            # A fork that ran no hooks.
            self._begin_anew()
        with self._lock:
            if anew:
                self._drop_idle()
            while True:
                link = self._ready(looks=looks)
                if link is not None:
                    self._taken.add(link)
                    return link
                if self._is_closed or self._connect is None:
                    raise ServerUnreachableError(closed(self._address))
                if len(self._taken) + self._under_way < self._most:
                    break
                if not self._wait_for_another(deadline):
                    raise ServerUnreachableError(f"all {self._most} connections to {self._address} are in use")
            self._under_way += 1
        try:
            link = self._connected(self._connect, deadline)
            try:
                has_not_spoken(link, self._address)
            except BaseException:
                link.close()
                raise
        finally:
            with self._lock:
                self._under_way -= 1
                self._changed.notify()
        with self._lock:
            self._taken.add(link)
        return link

    def give_back(self, link: socket.socket) -> None:
        """The exchange on `link` is over, and nothing of it is still to come."""
        with self._lock:
            self._taken.discard(link)
            if self._is_closed:
                link.close()
            else:
                self._idle.append((link, time.monotonic()))
            if self._waiting:
                self._changed.notify()

    def drop(self, link: socket.socket) -> None:
        """`link` is of no use any more."""
        with self._lock:
            self._taken.discard(link)
            link.close()
            self._changed.notify()

    def close(self) -> None:
        """End all connections, those that are in use too. Closing twice does nothing more."""
        with self._lock:
            self._is_closed = True
            self._drop_idle()
            for link in self._taken:
                # Its user closes it: a descriptor that is closed under a call may be another's by its next one.
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()

    def _wait_for_another(self, deadline: float) -> bool:
        self._waiting += 1
        try:
            return self._changed.wait(deadline - time.monotonic())
        finally:
            self._waiting -= 1

    def _ready(self, *, looks: bool) -> socket.socket | None:
        """One that waits to be used, the one that was used last first."""
        if self._new is not None:
            link, self._new = self._new, None
            try:
                has_not_spoken(link, self._address)
            except BaseException:
                link.close()
                raise
            return link
        while self._idle:
            link, since = self._idle.pop()
            idle = time.monotonic() - since
            if idle < _MOMENT and not looks and self._connect is not None:
                return link
            # Without another to be had, an old one is better than none.
            if idle < IDLE_SECONDS or self._connect is None:
                try:
                    has_not_spoken(link, self._address)
                except (ServerUnreachableError, UnknownServerError):
                    if self._connect is None:
                        link.close()
                        raise
                else:
                    return link
            link.close()
        return None

    def _connected(self, connect: Connect, deadline: float) -> socket.socket:
        give_up = min(deadline, time.monotonic() + RECONNECT_SECONDS)
        pause = _FIRST_PAUSE
        while True:
            try:
                return self._prepared(connect(max(0.001, deadline - time.monotonic())))
            except ServerUnreachableError:
                if time.monotonic() + pause >= give_up or self._is_closed:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _prepared(self, link: socket.socket) -> socket.socket:
        # The kernel's own time limits: with Python's, each send and each receive takes a poll before it.
        link.settimeout(None)
        whole, fraction = divmod(self._timeout, 1)
        limit = struct.pack("ll", int(whole), max(1, int(fraction * 1e6)))
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        return link

    def _drop_idle(self) -> None:
        if self._new is not None:
            self._new.close()
            self._new = None
        while self._idle:
            self._idle.pop()[0].close()

    def _begin_anew(self) -> None:
        """In the child of a fork."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0
        self._drop_idle()
        # Of those in use nobody is left who would close them; while they are open here, a server does not see them end.
        while self._taken:
            self._taken.pop().close()
        self._under_way = 0


_all: Final[weakref.WeakSet[Links]] = weakref.WeakSet()


def _after_fork() -> None:
    for links in list(_all):
        links._begin_anew()


os.register_at_fork(after_in_child=_after_fork)
