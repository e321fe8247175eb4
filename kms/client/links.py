"""The connections of one client: taken by one thread or task at a time, kept for the next, and never shared by accident.

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
        has_others: bool | None = None,
    ) -> None:
        """`first` is a connection that nothing was sent on yet. Without `connect` there is no other, unless `has_others`
        says that they are made elsewhere and added.

        A send or a receive on one that is taken waits for `timeout` seconds, and raises `BlockingIOError` then.
        """
        self._address = address
        self._timeout = timeout
        self._connect = connect
        self.has_others: Final = connect is not None if has_others is None else has_others
        """Whether another connection can be made."""
        self._most = most if self.has_others else 1
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0
        self._process = os.getpid()
        self.is_closed = False
        self._new: socket.socket | None = first
        self._prepare(first)
        self._idle: list[tuple[socket.socket, float]] = []
        self._taken: set[socket.socket] = set()
        self._under_way = 0
        _all.add(self)

    def take(self, deadline: float, *, anew: bool = False, looks: bool = True) -> socket.socket:
        """A connection for the caller alone, by `deadline` (`time.monotonic`); with `anew` one that was never used.

        Unless it `looks`, one that was used a moment ago may have ended since. Raises `ServerUnreachableError`, and what
        connecting raises.
        """
        while True:
            link = self.ready(anew=anew, looks=looks)
            if link is not None:
                return link
            with self._lock:
                if len(self._taken) + self._under_way < self._most:
                    self._under_way += 1
                    break
                if not self._wait_for_another(deadline):
                    raise ServerUnreachableError(f"all {self._most} connections to {self._address} are in use")
        try:
            link = self._connected(deadline)
        finally:
            with self._lock:
                self._under_way -= 1
                self._changed.notify()
        return self.add(link)

    def ready(self, *, anew: bool = False, looks: bool = True) -> socket.socket | None:
        """A connection that waits to be used, taken; None where there is none, and another can be made.

        For who makes it otherwise than `take` does. Raises as that.
        """
        if self._process != os.getpid():
            # A fork that ran no hooks.
            self.begin_anew()
        with self._lock:
            if anew:
                self._drop_idle()
            link = self._idle_one(looks=looks)
            if link is not None:
                self._taken.add(link)
            elif self.is_closed or (not self.has_others and not self._taken):
                raise ServerUnreachableError(closed(self._address))
            return link

    def has_room(self, connecting: int) -> bool:
        """Whether there may be another connection, beside those that are taken and `connecting` that are being made."""
        return len(self._taken) + connecting < self._most

    def add(self, link: socket.socket) -> socket.socket:
        """A connection that was just made is taken by who made it. Raises what `has_not_spoken` raises."""
        try:
            self._prepare(link)
            has_not_spoken(link, self._address)
        except BaseException:
            link.close()
            raise
        with self._lock:
            self._taken.add(link)
        return link

    def give_back(self, link: socket.socket) -> None:
        """The exchange on `link` is over, and nothing of it is still to come."""
        with self._lock:
            self._taken.discard(link)
            if self.is_closed:
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

    def drop_idle(self) -> None:
        """Whatever is asked next is asked on a new connection."""
        with self._lock:
            self._drop_idle()

    def close(self) -> None:
        """End all connections, those that are in use too. Closing twice does nothing more."""
        with self._lock:
            self.is_closed = True
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

    def _idle_one(self, *, looks: bool) -> socket.socket | None:
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
            if idle < _MOMENT and not looks and self.has_others:
                return link
            # Without another to be had, an old one is better than none.
            if idle < IDLE_SECONDS or not self.has_others:
                try:
                    has_not_spoken(link, self._address)
                except (ServerUnreachableError, UnknownServerError):
                    if not self.has_others:
                        link.close()
                        raise
                else:
                    return link
            link.close()
        return None

    def _connected(self, deadline: float) -> socket.socket:
        if self._connect is None:
            raise ServerUnreachableError(closed(self._address))
        give_up = min(deadline, time.monotonic() + RECONNECT_SECONDS)
        pause = _FIRST_PAUSE
        while True:
            try:
                return self._connect(max(0.001, deadline - time.monotonic()))
            except ServerUnreachableError:
                if time.monotonic() + pause >= give_up or self.is_closed:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _prepare(self, link: socket.socket) -> None:
        # The kernel's own time limits: with Python's, each send and each receive takes a poll before it.
        link.settimeout(None)
        whole, fraction = divmod(self._timeout, 1)
        limit = struct.pack("ll", int(whole), max(1, int(fraction * 1e6)))
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def _drop_idle(self) -> None:
        if self._new is not None:
            self._new.close()
            self._new = None
        while self._idle:
            self._idle.pop()[0].close()

    def begin_anew(self) -> None:
        """In the child of a fork: forget all connections, and close them here."""
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
        links.begin_anew()


os.register_at_fork(after_in_child=_after_fork)
