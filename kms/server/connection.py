"""One connection: bytes to requests, replies to bytes.

Rules:

- a frame has to be whole within the idle time, counted from when the server starts to wait for it;
- a batch of replies has to be taken by the client within the write time;
- while a request is at work there is no deadline;
- replies go out in the order of the requests, one `send` for all replies of a read;
- what one connection makes the server hold is one unfinished frame, one read, and the replies to that read.

It works on the bare non-blocking socket: `SocketStream` pays a trip through the scheduler for each send that would
not block. One cancel scope serves for the whole connection and has its deadline moved, which is cheaper than a new
timeout for each read.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

import trio

from kms.limits import IDLE_TIMEOUT, MAX_FRAME_BYTES, READ_BYTES, WRITE_TIMEOUT
from kms.server.middleware import Peer
from kms.wire.framing import Framer

_LINGER_SECONDS = 1.0
_LINGER_READS = 64


@dataclass(frozen=True, slots=True)
class ConnectionBounds:
    """What one connection may use: bytes and seconds."""

    max_frame_bytes: int = MAX_FRAME_BYTES
    idle_timeout: float = IDLE_TIMEOUT
    write_timeout: float = WRITE_TIMEOUT


class Pipeline(Protocol):
    """What answers lines; see `RequestPipeline`."""

    def serve(self, line: bytes, peer: Peer) -> bytes | Awaitable[bytes]: ...

    def frame_too_large(self, limit: int, peer: Peer) -> bytes: ...


class Connection:
    """Serves one socket until its client leaves, breaks a bound, or the server drains."""

    def __init__(self, sock: socket.socket, pipeline: Pipeline, peer: Peer, bounds: ConnectionBounds) -> None:
        """`sock` is connected and non-blocking; it is closed when `serve` ends."""
        self._sock = sock
        self._pipeline = pipeline
        self._peer = peer
        self._bounds = bounds
        self._framer = Framer(bounds.max_frame_bytes)
        self._scope = trio.CancelScope()
        self._waiting = True
        self._draining = False

    def drain(self) -> None:
        """Finish what is at work, then close; a connection that only waits for a frame closes now."""
        self._draining = True
        if self._waiting:
            self._scope.cancel()

    async def serve(self) -> None:
        """Serve until the end. A broken connection is an end like any other."""
        try:
            with self._scope:
                await self._converse()
        except OSError:
            pass
        finally:
            self._sock.close()

    async def _converse(self) -> None:
        framer = self._framer
        self._await_frame()
        while not self._draining:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                continue
            frames = framer.feed(data) if data else framer.finish()
            if frames or framer.too_large:
                self._waiting = False
                self._scope.deadline = math.inf
                await self._answer(frames)
                if framer.too_large:
                    await self._send(self._pipeline.frame_too_large(self._bounds.max_frame_bytes, self._peer) + b"\n")
                    await self._linger()
                    return
                self._await_frame()
            if not data:
                return

    def _await_frame(self) -> None:
        self._waiting = True
        self._scope.deadline = trio.current_time() + self._bounds.idle_timeout

    async def _answer(self, frames: list[bytes]) -> None:
        replies = bytearray()
        for frame in frames:
            reply = self._pipeline.serve(frame, self._peer)
            if not isinstance(reply, bytes):
                # It waits for the disk: what is ready must not wait with it.
                await self._send(replies)
                replies.clear()
                reply = await reply
            replies += reply
            replies += b"\n"
            if len(replies) >= READ_BYTES:
                await self._send(replies)
                replies.clear()
        await self._send(replies)

    async def _send(self, data: bytes | bytearray) -> None:
        sent = 0
        with memoryview(data) as rest:
            while sent < len(rest):
                try:
                    sent += self._sock.send(rest[sent:])
                except BlockingIOError:
                    if self._scope.deadline == math.inf:
                        self._scope.deadline = trio.current_time() + self._bounds.write_timeout
                    await trio.lowlevel.wait_writable(self._sock)
        self._scope.deadline = math.inf

    async def _linger(self) -> None:
        """Read on for a moment after the last reply: closing with unread bytes resets, and could take the reply along."""
        self._scope.deadline = trio.current_time() + _LINGER_SECONDS
        self._sock.shutdown(socket.SHUT_WR)
        for _ in range(_LINGER_READS):
            await trio.lowlevel.wait_readable(self._sock)
            try:
                if not self._sock.recv(READ_BYTES):
                    return
            except BlockingIOError:
                continue
