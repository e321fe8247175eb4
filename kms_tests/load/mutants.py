"""Servers with a fault, to see that the checks find it. Each function breaks the process that calls it."""

from __future__ import annotations

import socket
import time

from kms.server.connection import Connection, ConnectionBounds
from kms.service.pipeline import Later, Session
from kms.wire.framing import Framer

STALL = b"stall"
"""A line that holds this is what a server that `stalls` stalls on."""


def stalls() -> None:
    """Let one client hold up all others for a moment."""
    serve = Session.serve

    def slow(self: Session, line: bytes) -> bytes | Later:
        if STALL in line:
            time.sleep(4)
        return serve(self, line)

    Session.serve = slow  # type: ignore[method-assign]


def errs() -> None:
    """Answer one request in a hundred with an error."""
    serve = Session.serve
    count = 0

    def erring(self: Session, line: bytes) -> bytes | Later:
        nonlocal count
        count += 1
        # What warms a client up comes first.
        return serve(self, line if count < 500 or count % 100 else b"{}")

    Session.serve = erring  # type: ignore[method-assign]


def fails() -> None:
    """Raise on a line that does not even begin like JSON, instead of answering."""
    serve = Session.serve

    def failing(self: Session, line: bytes) -> bytes | Later:
        if not line.startswith(b"{"):
            raise ValueError
        return serve(self, line)

    Session.serve = failing  # type: ignore[method-assign]


def keeps_memory() -> None:
    """Never let go of what was read."""
    feed = Framer.feed
    kept = []

    def keeping(self: Framer, data: bytes) -> list[bytes]:
        kept.append(data)
        return feed(self, data)

    Framer.feed = keeping  # type: ignore[method-assign]


def keeps_descriptors() -> None:
    """Never let go of a connection's descriptor."""
    init = Connection.__init__
    kept: list[socket.socket] = []

    def keeping(self: Connection, sock: socket.socket, *rest: object) -> None:
        kept.append(sock.dup())
        init(self, sock, *rest)  # type: ignore[arg-type]

    Connection.__init__ = keeping  # type: ignore[assignment, method-assign]


def waits_for_readers() -> None:
    """Never cut off a client that does not read its replies."""
    *others, _ = ConnectionBounds.__init__.__defaults__ or ()
    ConnectionBounds.__init__.__defaults__ = (*others, 3600.0)
