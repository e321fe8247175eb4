"""The chain every request passes: audit(authenticate(authorize(handler))).

Authentication comes before validation. A line that does not decode is still asked for its token, and a caller who is
nobody learns nothing about what was wrong with the request; only a line of no known type has no plane whose token it
could be asked for. The audit stands outermost, so that it sees every outcome:
control-plane operations and every refusal are logged, never a token, plaintext, ciphertext or AAD.

Who comes in and what they may do is decided anew for each request, by whatever authenticator and policy are in force
then; for a change of keys once more, when the actor takes it up. So what `admit` puts in force needs no connection to be
closed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from time import perf_counter
from typing import Final

from msgspec import structs

from kms.core.keyring import KeyGroup
from kms.core.names import shown
from kms.core.policy import KeyAuthorizationPolicy, Operation, Plane, Principal, Rules
from kms.errors import AuthFailedError, FrameTooLargeError, InternalError, ThrottledError, UnavailableError, WireError
from kms.service.audit_trail import AuditTrail
from kms.service.authentication import Authenticator
from kms.service.authorization import authorize
from kms.service.bugs import log_bug
from kms.service.event import Event
from kms.service.handlers import Handlers
from kms.service.listing import LongReply
from kms.service.quotas import Limits, Quotas
from kms.service.refusals import Refusals
from kms.service.served import Observer, Peer, Served, Turn, UsageCounter
from kms.wire.messages import (
    OUTCOME_UNKNOWN,
    ErrorReply,
    Reply,
    Request,
    UndecodableRequestError,
    decode_request,
    encode,
    presented,
)

log: Final = logging.getLogger("kms.audit")

_NO_LIMITS: Final[Mapping[str, Limits]] = {}

_DATA: Final = Plane.DATA
_HEALTH: Final = Operation.HEALTH
"""Looked up through its class, a member of an enum takes 0.1 us on Python 3.11."""
_ANSWERED_ALL_THE_SAME: Final = frozenset({Operation.HEALTH, Operation.STATUS})
"""What is answered though it cannot be put on record: it is how one finds out."""


class Streamed:
    """A reply that is made while it is sent, which may begin once `Session.commit` has put it on record."""

    def __init__(self, reply: LongReply) -> None:
        self._reply = reply

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Its line, without the end. Raises `ConnectionAbortedError` where it cannot be finished."""
        try:
            async with aclosing(self._reply.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        except Exception as error:
            log_bug("unexpected error in a long reply", error)
            raise ConnectionAbortedError from None


Later = Callable[[], Awaitable[bytes | Streamed]]
"""A reply that may wait for the disk. Nothing of it has begun until it is called, so it may be dropped until then."""


class Refusal(bytes):
    """A reply to somebody who is known, and was refused."""


class Rejection(bytes):
    """A reply to somebody who has not shown to be anybody: no right token, or no request that could say whose it is."""


class RequestPipeline:
    """From one line to one encoded reply, over all connections. It never raises: what went wrong is the reply."""

    def __init__(
        self,
        handlers: Handlers,
        authenticator: Authenticator,
        policy: KeyAuthorizationPolicy,
        observers: Sequence[Observer] = (),
        trail: AuditTrail | None = None,
        usage: UsageCounter | None = None,
        limits: Mapping[str, Limits] = _NO_LIMITS,
    ) -> None:
        """`observers` are told of every request; with a `trail`, what cannot be put on record is not answered."""
        self.data_handlers = handlers.data_plane()
        self.control_handlers = handlers.control_plane()
        self.observers = tuple(observers)
        self.usage = usage
        self._refusals = Refusals(time.monotonic)
        self.quotas = Quotas(time.monotonic)
        self.admit(authenticator, policy, trail, limits)

    def admit(
        self,
        authenticator: Authenticator,
        policy: KeyAuthorizationPolicy,
        trail: AuditTrail | None = None,
        limits: Mapping[str, Limits] = _NO_LIMITS,
    ) -> None:
        """From now on let these decide: about new requests, and about changes of keys that still wait."""
        self.authenticator = authenticator
        self.policy = policy
        self.trail = trail
        self.quotas.admit(limits)
        self.is_watched = bool(self.observers) or trail is not None

    def record(self, served: Served) -> None:
        """Put `served` into the log, or count it, where it is a refusal that repeats itself."""
        if isinstance(served.error, UnavailableError):
            return  # that the audit log cannot be written is said once, not for each request
        if served.error is None or self._refusals.is_first(served):
            log.info(_event(served))

    def tell_repeats(self) -> None:
        """Put into the log how many refusals were only counted."""
        for kind, count in self._refusals.take():
            log.info(Event({**kind._asdict(), "refusedMore": count}))

    def session(self, peer: Peer) -> Session:
        """What answers the requests of one connection."""
        return Session(self, peer)

    def commit(self, turns: Sequence[Turn]) -> list[bytes | None]:
        """Put turns on record, all or none: for each None when that is done, or what to send instead."""
        if self.trail is not None:
            try:
                self.trail.write(turns)
            except UnavailableError as error:
                return [_unrecorded(turn, error) for turn in turns]
        return [None] * len(turns)


class Session:
    """The requests of one connection, numbered in the order in which they come."""

    __slots__ = ("_number", "_peer", "_pipeline", "turn")

    def __init__(self, pipeline: RequestPipeline, peer: Peer) -> None:
        self._pipeline = pipeline
        self._peer = peer
        self._number = 0
        self.turn: Turn = []
        """What was served and is not on record yet; empty where no record is kept."""

    def serve(self, line: bytes) -> bytes | Later:
        """The reply line to `line`, without its line end; for the control plane, what to call for it."""
        began = perf_counter()
        self._number = number = self._number + 1
        try:
            request = decode_request(line)
        except UndecodableRequestError as error:
            return self._refuse_undecodable(number, error, began)
        if request.plane is not _DATA:
            return partial(self._serve_control, number, request, began)
        pipeline, principal = self._pipeline, None
        try:
            principal = pipeline.authenticator.authenticate(_DATA, request.token, self._peer)
            if pipeline.quotas.rates:
                pipeline.quotas.throttle(principal)
            authorize(pipeline.policy, principal, request)
            if pipeline.trail is not None and request.operation is not _HEALTH:
                pipeline.trail.check()
            kind = type(request)
            reply = pipeline.data_handlers[kind](request)
        except Exception as error:
            return self._failed(number, request, principal, error, began)
        if pipeline.usage is not None:
            pipeline.usage.count(kind, request, reply, principal, began)
        if request.request_id is not None:
            reply = _named(reply, request.request_id)
        if pipeline.is_watched:
            served = Served(self._peer, number, request, kind, principal, reply, None, began, request.request_id)
            return self._answer(served, reply)[0]
        return encode(reply)

    def reject(self, line: bytes) -> Rejection | None:
        """The reply to `line`, if who sent it shows no right token; else None, and nothing was served.

        It costs little, also of a long line, which whoever wants to be served has to have in front of their others.
        """
        began = perf_counter()
        shown = presented(line)
        if shown is None:
            return None
        kind, token = shown
        try:
            self._pipeline.authenticator.authenticate(kind.plane, token, self._peer)
        except AuthFailedError as error:
            self._number += 1
            served = Served(self._peer, self._number, None, kind, None, None, error.with_traceback(None), began, None)
            return Rejection(self._refuse(served, error))
        return None

    def commit(self) -> bytes | None:
        """Put what was served since the last time on record: None when that is done, or what to send instead."""
        return self._pipeline.commit([self.take()])[0] if self.turn else None

    def take(self) -> Turn:
        """The same, for who puts it on record otherwise."""
        turn, self.turn = self.turn, []
        return turn

    async def _serve_control(self, number: int, request: Request, began: float) -> bytes | Streamed:
        pipeline = self._pipeline
        caller = _Caller(pipeline, number, request, self._peer)
        try:
            caller.arrive()
            reply = await pipeline.control_handlers[type(request)](request, caller)
        except Exception as error:
            caller.take_back()
            return self._failed(number, request, caller.principal, error, began, has_begun=caller.has_begun)
        streamed = None if isinstance(reply, Reply) else Streamed(reply)
        if not isinstance(reply, Reply):
            reply = reply.summary
        elif request.request_id is not None:
            reply = _named(reply, request.request_id)
        served = Served(
            self._peer, number, request, type(request), caller.principal, reply, None, began, request.request_id
        )
        self._pipeline.record(served)
        line, is_reply = self._answer(served, reply, has_begun=caller.has_begun)
        return streamed if streamed is not None and is_reply else line

    def frame_too_large(self, limit: int) -> bytes:
        """The reply to a line over the limit, after which the connection is closed."""
        self._number += 1
        error = FrameTooLargeError(f"a request line has at most {limit} bytes")
        return self._refuse(Served(self._peer, self._number, None, None, None, None, error, perf_counter(), None), error)

    def _refuse_undecodable(self, number: int, error: UndecodableRequestError, began: float) -> bytes:
        principal: Principal | None = None
        reason: WireError = error.reason
        if error.kind is not None:
            try:
                principal = self._pipeline.authenticator.authenticate(error.kind.plane, error.token, self._peer)
                self._pipeline.quotas.throttle(principal)
            except (AuthFailedError, ThrottledError) as failure:
                # Its traceback leads to this frame, and so back to it: a circle, that would keep the request for a while.
                reason = failure.with_traceback(None)
        served = Served(self._peer, number, None, error.kind, principal, None, reason, began, error.request_id)
        reply = self._refuse(served, reason)
        return Rejection(reply) if error.kind is None else reply

    def _failed(
        self,
        number: int,
        request: Request,
        principal: Principal | None,
        error: Exception,
        began: float,
        *,
        has_begun: bool = False,
    ) -> bytes:
        """The reply to a request that raised. A bug costs this one reply, not the connection."""
        if not isinstance(error, WireError):
            log_bug(f"unexpected error in {request.operation.value}", error)
            error = InternalError("internal error; the server's log has the details")
            if request.changes:
                error = error.of_unknown_outcome()
        served = Served(self._peer, number, request, type(request), principal, None, error, began, request.request_id)
        return self._refuse(served, error, has_begun=has_begun)

    def _refuse(self, served: Served, error: WireError, *, has_begun: bool = False) -> bytes:
        self._pipeline.record(served)
        usage = self._pipeline.usage
        if usage is not None:
            usage.refused(served)
        reply = _error_reply(error, served)
        line, _ = self._answer(served, reply, has_begun=has_begun)
        return Rejection(line) if isinstance(error, AuthFailedError) else Refusal(line)

    def _answer(self, served: Served, reply: Reply, *, has_begun: bool = False) -> tuple[bytes, bool]:
        """The line of `reply`, which is sent once `served` is on record, where there is one.

        And whether it is: a change whose outcome cannot be put on record now is answered with an error instead.
        """
        pipeline = self._pipeline
        for observer in pipeline.observers:
            observer(served)
        trail = pipeline.trail
        if trail is None:
            return encode(reply), True
        waits_for: Served | None = served
        is_reply = True
        if has_begun:
            waits_for = None
            try:
                trail.finish(served)
            except UnavailableError as error:
                if served.error is None:
                    error = UnavailableError(f"the change is made, but not on record yet: {error}").of_unknown_outcome()
                elif not served.error.is_outcome_known:
                    error = error.of_unknown_outcome()
                reply, is_reply = _error_reply(error, served), False
        line = encode(reply)
        self.turn.append((line, waits_for))
        return line, is_reply


def _error_reply(error: WireError, served: Served) -> ErrorReply:
    after = math.ceil(error.retry_after * 1000) if isinstance(error, ThrottledError) else None
    outcome = None if error.is_outcome_known else OUTCOME_UNKNOWN
    return ErrorReply(error.code, str(error), after, outcome, request_id=served.request_id)


def _named(reply: Reply, request_id: str) -> Reply:
    # A copy: some replies are the same object each time.
    return structs.replace(reply, request_id=request_id)


class _Caller:
    """The `Caller` of one request: its name from when it came, its right to ask looked up anew each time."""

    def __init__(self, pipeline: RequestPipeline, number: int, request: Request, peer: Peer) -> None:
        self.principal: Principal | None = None
        self.has_begun = False
        """Whether the change that it asks for is on record as begun."""
        self._is_counted = False
        self._pipeline = pipeline
        self._number = number
        self._request = request
        self._peer = peer

    def arrive(self) -> None:
        """Raises as `permit`, and `ThrottledError`; what is known of who asks is kept all the same."""
        principal = self._identified()
        self._pipeline.quotas.throttle(principal)
        authorize(self._pipeline.policy, principal, self._request)

    def permit(self) -> None:
        principal = self._identified()
        authorize(self._pipeline.policy, principal, self._request)
        self._pipeline.quotas.begin(principal, self._request.operation)
        self._is_counted = True
        trail = self._pipeline.trail
        if trail is not None:
            trail.begin(self._peer, self._number, self._request, self.principal)
            self.has_begun = True

    def take_back(self) -> None:
        """The change was not made: it counts towards no limit."""
        if self._is_counted and self.principal is not None:
            self._pipeline.quotas.take_back(self.principal, self._request.operation)

    def _identified(self) -> Principal:
        self.principal = self._pipeline.authenticator.authenticate(self._request.plane, self._request.token, self._peer)
        return self.principal

    @property
    def name(self) -> str:
        return "" if self.principal is None else self.principal.name

    @property
    def rules(self) -> Rules | None:
        return Rules((), ()) if self.principal is None else self._pipeline.policy.rules_of(self.principal)

    def may(self, operation: Operation) -> bool:
        return self.principal is not None and self._pipeline.policy.allows(self.principal, operation, None, b"")

    @property
    def most_timed_disables(self) -> int | None:
        return None if self.principal is None else self._pipeline.quotas.most_timed_disables(self.principal)

    def allowed(self, operation: Operation, groups: Sequence[KeyGroup]) -> list[KeyGroup]:
        principal, allows = self.principal, self._pipeline.policy.allows
        if principal is None:
            return []
        return [group for group in groups if allows(principal, operation, group.key_id, b"")]


def _event(served: Served) -> Event:
    request, kind = served.request, served.kind
    is_strangers = served.principal is None and served.error is not None
    # Of who is not authenticated no text is kept.
    group = None if is_strangers else getattr(request, "key_id", None)
    fields: dict[str, str | int | None] = {
        "connection": served.peer.connection,
        "request": served.number,
        "transport": served.peer.transport,
        "principal": None if served.principal is None else served.principal.name,
        "operation": None if kind is None else kind.operation.value,
        "group": None if group is None else shown(group),
        "version": None if is_strangers else getattr(request, "version", None),
        "outcome": "ok" if served.error is None else served.error.code,
    }
    if served.request_id is not None and not is_strangers:
        fields["requestId"] = served.request_id
    return Event(fields)


def _unrecorded(turn: Turn, error: UnavailableError) -> bytes:
    """What to send in the place of a turn's replies when `error` kept them off the record."""
    return b"".join(_instead(reply, served, error) + b"\n" for reply, served in turn)


def _instead(reply: bytes, served: Served | None, error: UnavailableError) -> bytes:
    if served is None or (served.kind is not None and served.kind.operation in _ANSWERED_ALL_THE_SAME):
        return reply
    return encode(_error_reply(error, served))
