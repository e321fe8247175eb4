"""All connections together: accepted, numbered, capped, and drained as one."""

from __future__ import annotations

import itertools
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import trio

from kms.host.peer import credentials_of
from kms.limits import GUARANTEED_FRACTION
from kms.server.connection import Connection, ConnectionBounds, Session
from kms.server.listeners import Endpoint
from kms.server.outbox import Outbox
from kms.service.bugs import log_bug
from kms.service.served import Peer


@dataclass
class Crowd:
    """The connections that are open, over all listeners."""

    session: Callable[[Peer], Session]
    bounds: ConnectionBounds
    outbox: Outbox
    max_connections: int
    open: Counter[str] = field(default_factory=Counter)
    """How many are served now, by transport."""
    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    """How many there were too many."""
    evicted: Counter[str] = field(default_factory=Counter)
    """How many had to make room, of those on which nobody had shown a right token."""
    _open: dict[str, set[Connection]] = field(default_factory=lambda: defaultdict(set))
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _draining: bool = False

    async def accept(self, endpoint: Endpoint, connections: trio.Nursery) -> None:
        """Serve whoever comes in by `endpoint`, each in a task of `connections`, until cancelled."""

        async def serve(stream: trio.SocketStream) -> None:
            # The connection works on the bare socket; the stream around it is let go.
            sock = socket.socket(fileno=stream.socket.detach())
            sock.settimeout(0)
            await self.serve(sock, endpoint.transport)

        # It pauses on EMFILE and goes on, which is what a server that ran out of descriptors has to do.
        await trio.serve_listeners(serve, [endpoint.listener], handler_nursery=connections)

    async def serve(self, sock: socket.socket, transport: str) -> None:
        """Serve one accepted socket, or close it at once when there are too many. A failure ends here."""
        with sock:
            if self._draining:
                return
            if not self._has_room(transport):
                self.refused[transport] += 1
                return
            self.accepted[transport] += 1
            self.open[transport] += 1
            try:
                peer = peer_of(sock, next(self._numbers), transport)
                await self._serve(Connection(sock, self.session(peer), self.bounds, self.outbox), self._open[transport])
            except* Exception as errors:
                log_bug("a connection failed", errors)
            finally:
                self.open[transport] -= 1

    async def _serve(self, connection: Connection, beside: set[Connection]) -> None:
        beside.add(connection)
        try:
            await connection.serve()
        finally:
            beside.discard(connection)

    def _has_room(self, transport: str) -> bool:
        """Whether one more may come in by `transport`, for which one that nobody is known on may have to go.

        Each way in has a share that the others cannot take, beyond what all may have together: over TCP anybody on the
        machine may come, over the Unix socket only those who may open it. Nobody has to go from a way in that does not
        have more than its share, but for who comes in by the same.
        """
        share = self.max_connections // GUARANTEED_FRACTION
        if len(self._open[transport]) < share or sum(map(len, self._open.values())) < self.max_connections:
            return True
        strangers = [
            (connection.idle_since, at, connection)
            for at, there in self._open.items()
            if at == transport or len(there) > share
            for connection in there
            if not connection.is_known
        ]
        if not strangers:
            return False
        _, at, longest = min(strangers, key=lambda stranger: stranger[0])
        self._open[at].discard(longest)
        longest.evict()
        self.evicted[at] += 1
        return True

    def drain(self) -> None:
        """Let each connection finish what it is at, and take no more."""
        self._draining = True
        for connection in chain.from_iterable(self._open.values()):
            connection.drain()


def peer_of(sock: socket.socket, number: int, transport: str) -> Peer:
    """Who connected `sock`: which process over a Unix socket; over TCP, where the kernel does not tell, from which port."""
    if sock.family != socket.AF_UNIX:
        try:
            return Peer(number, transport, port=sock.getpeername()[1])
        except OSError:
            return Peer(number, transport)  # it has gone already
    return Peer(number, transport, credentials_of(sock))
