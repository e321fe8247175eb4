"""One connection: bytes to requests, replies to bytes.

Rules:

- a frame has to be whole within the idle time, counted from when the server starts to wait for it, and a slack of at
  most a sixteenth of it;
- a batch of replies has to be taken by the client within the write time;
- while a request is at work there is no deadline;
- replies go out in the order of the requests, one `send` for all replies of a turn;
- nothing goes out that has to be on record and is not. Who sends one request at a time shares the write of the record
  with all others that are answered in the same round of the event loop (`Outbox`);
- after TURN_REQUESTS requests it is the other connections' turn, however many more one read has brought; after one that
  is refused, at once;
- frames of more than one read are served one at a time, over all connections: each may take as long as a thousand others.
  Those without a right token are refused before they come to that, and those of which it cannot be told wait for each
  other first, so that no more than one of them is ever before somebody who is known;
- a connection whose first byte begins no JSON is closed without a word: it speaks another protocol, HTTP perhaps, in which
  a web page can have lines of ours in the body of a request;
- who shows no right token does not earn a new idle time, and is cut off after MAX_REJECTIONS requests in a row;
- what may be long, as a list, is sent in pieces as it is made, and waits for its client no longer than others, in all;
- what one connection makes the server hold is one unfinished frame, one read, and the replies of one turn.

It works on the bare non-blocking socket: `SocketStream` pays a trip through the scheduler for each send that would
not block, which took as long as answering a request: 10 us against 20 for each line of an echo. One cancel scope
serves for the whole connection. To move its deadline takes 1.9 us, so it is moved only once it would end too early;
what is answered without waiting needs none.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from kms.limits import IDLE_TIMEOUT, MAX_FRAME_BYTES, MAX_REJECTIONS, READ_BYTES, TURN_REQUESTS, WRITE_TIMEOUT
from kms.server.outbox import Outbox
from kms.service.pipeline import Later, Refusal, Rejection, Streamed
from kms.service.served import Turn
from kms.wire.framing import Framer

_LINGER_SECONDS = 1.0
_LINGER_READS = 64
_one_large_frame = trio.Lock()
"""Two hundred of 1 MiB that end in the same instant would otherwise be one turn of many seconds."""
_one_stranger = trio.Lock()
"""In front of it: of those whose token cannot even be read."""
_FIRST_BYTES: Final = frozenset(b" \t\r\n{")


@dataclass(frozen=True, slots=True)
class ConnectionBounds:
    """What one connection may use: bytes and seconds."""

    max_frame_bytes: int = MAX_FRAME_BYTES
    idle_timeout: float = IDLE_TIMEOUT
    write_timeout: float = WRITE_TIMEOUT


class Session(Protocol):
    """What answers the lines of one connection; see `kms.service.pipeline.Session`."""

    @property
    def turn(self) -> Turn: ...

    def serve(self, line: bytes) -> bytes | Later: ...

    def reject(self, line: bytes) -> bytes | None: ...

    def frame_too_large(self, limit: int) -> bytes: ...

    def commit(self) -> bytes | None: ...

    def take(self) -> Turn: ...


class Connection:
    """Serves one socket until its client leaves, breaks a bound, or the server drains."""

    def __init__(self, sock: socket.socket, session: Session, bounds: ConnectionBounds, outbox: Outbox) -> None:
        """`sock` is connected and non-blocking; it is closed when `serve` ends."""
        self._sock = sock
        self._session = session
        self._bounds = bounds
        self._outbox = outbox
        self._is_in_outbox = False
        self._unsent = b""
        self._framer = Framer(bounds.max_frame_bytes)
        self._scope = trio.CancelScope()
        self._slack = bounds.idle_timeout / 16
        self._deadline = math.inf
        self._idle_deadline = math.inf
        self._rejections = 0
        self.is_known = False
        """Whether anybody has shown a right token on it."""
        self.idle_since = -math.inf
        """While that is not so: since the last whole frame, or since it was made."""
        self._clock: Callable[[], float]
        self._waiting = True
        self._draining = False

    def drain(self) -> None:
        """Finish what is at work, then close; a connection that only waits for a frame closes now."""
        self._draining = True
        if self._waiting:
            self._scope.cancel()

    def evict(self) -> None:
        """Make room for another: end at once."""
        self._scope.cancel()

    async def serve(self) -> None:
        """Serve until the end. A broken connection is an end like any other."""
        self._clock = trio.lowlevel.current_clock().current_time
        self.idle_since = self._clock()
        try:
            with self._scope:
                await self._converse()
        except OSError:
            pass
        finally:
            self._sock.close()

    async def _converse(self) -> None:
        framer, sock = self._framer, self._sock
        is_first = True
        self._await_frame()
        while not self._draining:
            try:
                await trio.lowlevel.wait_readable(sock)
                data = sock.recv(READ_BYTES)
            except BlockingIOError:
                continue
            except trio.ClosedResourceError:
                # Woken by `_deliver`; nothing is closed.
                await self._send_rest(self._unsent, 0)
                self._unsent = b""
                self._await_frame()
                continue
            if is_first:
                if data and data[0] not in _FIRST_BYTES:
                    return
                is_first = False
            frames = framer.feed(data) if data else framer.finish()
            if frames or framer.too_large:
                self._waiting = False
                if len(frames) == 1 and len(frames[0]) <= READ_BYTES:
                    rest = self._answer_one(frames[0], is_last=not data or framer.too_large)
                    if rest is not None:
                        await rest
                else:
                    await self._answer(frames)
                if framer.too_large:
                    await self._send_replies(self._session.frame_too_large(self._bounds.max_frame_bytes) + b"\n")
                    await self._linger()
                    return
                if self._rejections:
                    if self._rejections >= MAX_REJECTIONS:
                        return
                    self.idle_since = self._clock()
                else:
                    self.is_known = True
                self._await_frame()
            if not data:
                return

    def _await_frame(self) -> None:
        self._waiting = not self._is_in_outbox
        if not self._rejections:
            earliest = self._clock() + self._bounds.idle_timeout
            if not earliest <= self._idle_deadline <= earliest + self._slack:
                self._idle_deadline = earliest + self._slack
        if self._deadline != self._idle_deadline:
            self._end_at(self._idle_deadline)

    def _end_at(self, deadline: float) -> None:
        self._deadline = self._scope.deadline = deadline

    def _answer_one(self, frame: bytes, *, is_last: bool) -> Awaitable[None] | None:
        """Answer a request that came alone; returns what is still to be awaited.

        Mostly nothing is. Without the coroutines of `_answer` and `_send_replies` a request takes 15.7 us instead of 17.2.
        """
        reply = self._session.serve(frame)
        if type(reply) is bytes:
            self._rejections = 0
            # After the last one the socket may be closed before the round ends.
            if self._session.turn and not is_last:
                self._is_in_outbox = True
                self._outbox.add(self._session, reply + b"\n", self._deliver)
                return None
            instead = self._session.commit()
            data = reply + b"\n" if instead is None else instead
            sent = self._send_now(data)
            return None if sent == len(data) else self._send_rest(data, sent)
        return self._answer_otherwise(reply)

    async def _answer_otherwise(self, reply: bytes | Later) -> None:
        """The same for a rejection, and for a reply that waits for the disk."""
        if not isinstance(reply, bytes):
            self._end_at(math.inf)
            reply = await self._finished(await reply())
        self._rejections = self._rejections + 1 if type(reply) is Rejection else 0
        await self._send_replies(reply + b"\n")

    async def _answer(self, frames: list[bytes]) -> None:
        serve = self._session.serve
        replies = bytearray()
        for number, frame in enumerate(frames, 1):
            reply = serve(frame) if len(frame) <= READ_BYTES else await self._serve_large(frame)
            if not isinstance(reply, bytes):
                # It waits for the disk: what is ready must not wait with it.
                await self._send_replies(replies)
                replies.clear()
                self._end_at(math.inf)
                reply = await self._finished(await reply())
            replies += reply
            replies += b"\n"
            if type(reply) is Rejection:
                self._rejections += 1
                if self._rejections >= MAX_REJECTIONS:
                    break
            else:
                self._rejections = 0
            is_last = number == len(frames)
            if not is_last and (
                self._rejections or type(reply) is Refusal or number % TURN_REQUESTS == 0 or len(replies) >= READ_BYTES
            ):
                await self._send_replies(replies)
                replies.clear()
                self._end_at(math.inf)
                await trio.lowlevel.checkpoint()
        await self._send_replies(replies)

    async def _finished(self, reply: bytes | Streamed) -> bytes:
        """What is still to be sent of `reply` as a whole: all of it, or the end of one that is made while it is sent."""
        if isinstance(reply, bytes):
            return reply
        instead = self._session.commit()
        if instead is not None:
            return instead.removesuffix(b"\n")
        # What its client may keep us waiting is for the whole, as for any other reply.
        left, ready = self._bounds.write_timeout, b""
        async with contextlib.aclosing(reply.pieces()) as pieces:
            async for piece in pieces:
                if ready and (sent := self._send_now(ready)) < len(ready):
                    began = self._clock()
                    await self._send_rest(ready, sent, left)
                    left -= self._clock() - began
                ready = piece
        return ready

    async def _serve_large(self, frame: bytes) -> bytes | Later:
        self._end_at(math.inf)
        # For each its own turn: two hundred in one would be a second.
        await trio.lowlevel.checkpoint()
        if self.is_known:
            async with _one_large_frame:
                return self._session.serve(frame)
        rejection = self._session.reject(frame)
        if rejection is not None:
            return rejection
        async with _one_stranger, _one_large_frame:
            return self._session.serve(frame)

    async def _send_replies(self, replies: bytes | bytearray) -> None:
        """Send what was answered since the last time, if it could be put on record, or what the session says instead."""
        if not replies:
            return
        instead = self._session.commit()
        data = replies if instead is None else instead
        sent = self._send_now(data)
        if sent < len(data):
            await self._send_rest(data, sent)

    def _deliver(self, reply: bytes | None) -> None:
        """Send what was in the outbox. Called outside of this connection's task, which waits for the next frame."""
        self._is_in_outbox = False
        if reply is None:
            self._scope.cancel()
            return
        try:
            sent = self._send_now(reply)
        except OSError:
            sent = 0  # the task will find out
        if sent == len(reply):
            self._waiting = True
            if self._draining:
                self._scope.cancel()
        else:
            self._unsent = reply[sent:]
            # Wakes the task, with a ClosedResourceError. Nothing else does, while its client is silent.
            trio.lowlevel.notify_closing(self._sock)

    def _send_now(self, data: bytes | bytearray) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0

    async def _send_rest(self, data: bytes | bytearray, sent: int, within: float | None = None) -> None:
        self._end_at(self._clock() + (self._bounds.write_timeout if within is None else within))
        with memoryview(data) as rest:
            while sent < len(rest):
                await trio.lowlevel.wait_writable(self._sock)
                with contextlib.suppress(BlockingIOError):
                    sent += self._sock.send(rest[sent:])
        self._end_at(math.inf)

    async def _linger(self) -> None:
        """Read on for a moment after the last reply: closing with unread bytes resets, and could take the reply along."""
        self._end_at(self._clock() + _LINGER_SECONDS)
        self._sock.shutdown(socket.SHUT_WR)
        for _ in range(_LINGER_READS):
            await trio.lowlevel.wait_readable(self._sock)
            try:
                if not self._sock.recv(READ_BYTES):
                    return
            except BlockingIOError:
                continue
