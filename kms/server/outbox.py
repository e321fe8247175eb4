"""Replies that wait for the end of the event loop's round, to go on record together and then be sent.

With an audit log nothing is sent before it is on record. Were each connection to see to its own, each request would cost
a write of the log: 11 us, where all else takes 17. So the requests that are answered in one round of the event loop, those
of all connections that had something to read, go on record by one write, which takes 3 us for each of them. Nobody waits
longer for that: it is the last thing in the round, and where only one connection is at work it comes at once.

It is a trio instrument because of `before_io_wait`, which comes right after the last task of each round. A task of its own
would run one round later, and every connection would have to be woken for its reply: a trip through the scheduler each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from kms.service.bugs import log_bug
from kms.service.served import Turn

Commit = Callable[[Sequence[Turn]], list[bytes | None]]
"""Put turns on record: for each None when that is done, or what to send instead. `RequestPipeline.commit`."""

Deliver = Callable[[bytes | None], None]
"""Send a reply to its client, or, when it is None, send nothing any more: it was answered, and nobody knows whether that
is on record. Called outside of any task, so it neither waits nor blocks."""


class Answered(Protocol):
    """A session that has answered something which is not on record yet."""

    def take(self) -> Turn: ...


class Outbox(trio.abc.Instrument):
    """The replies of this round; at most one of each connection, which takes no further request until it was delivered."""

    def __init__(self, commit: Commit) -> None:
        self._commit = commit
        self._replies: list[tuple[Answered, bytes, Deliver]] = []
        self._is_installed = False

    def add(self, session: Answered, reply: bytes, deliver: Deliver) -> None:
        """Call `deliver` in the end of this round with `reply`, or with what is to be sent instead."""
        if not self._is_installed:
            # Only now: without an audit log no round of the event loop should pay for it.
            trio.lowlevel.add_instrument(self)
            self._is_installed = True
        self._replies.append((session, reply, deliver))

    def before_io_wait(self, timeout: float) -> None:
        """Called by trio. It never raises: trio would remove it, and then nothing would be sent any more."""
        replies = self._replies
        if not replies:
            return
        self._replies = []
        instead: list[bytes | None]
        try:
            instead = self._commit([session.take() for session, _, _ in replies])
        except Exception as error:
            log_bug("replies could not be put on record, their connections are closed", error)
            for _, _, deliver in replies:
                _call(deliver, None)
            return
        for (_, reply, deliver), other in zip(replies, instead, strict=True):
            _call(deliver, reply if other is None else other)


def _call(deliver: Deliver, reply: bytes | None) -> None:
    try:
        deliver(reply)
    except Exception as error:
        log_bug("a reply could not be delivered", error)
