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
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from hmac import compare_digest
from typing import Any, Final, NamedTuple

from kms.core import ciphertext
from kms.core.keyring import KeyGroup
from kms.core.policy import KeyAuthorizationPolicy, Operation, Plane, Principal
from kms.core.secret import Secret
from kms.errors import (
    AuthFailedError,
    FrameTooLargeError,
    InternalError,
    UnauthorizedError,
    WireError,
)
from kms.limits import MAX_GROUP_NAME_BYTES
from kms.server.handlers import Handlers, group_of
from kms.wire.messages import (
    Decrypt,
    Encrypt,
    ErrorReply,
    GenerateDataKey,
    ReEncrypt,
    Request,
    UndecodableRequestError,
    decode_request,
    encode,
)

log: Final = logging.getLogger("kms.audit")

_DATA: Final = Plane.DATA
"""Looked up through its class, a member of an enum takes 0.1 us on Python 3.11."""

Later = Callable[[], Awaitable[bytes]]
"""A reply that may wait for the disk. Nothing of it has begun until it is called, so it may be dropped until then."""


class Rejection(bytes):
    """A reply to somebody who has not shown to be anybody: no right token, or no request that could say whose it is."""


class Credentials(NamedTuple):
    """The process that connected, as the kernel vouches for it (unix(7), SO_PEERCRED); the gid is its primary group's."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a connection: a number for the log, `unix` or `tcp`, and over `unix` which process."""

    connection: int
    transport: str
    credentials: Credentials | None = None


@dataclass(frozen=True, slots=True)
class SharedToken:
    """One of the two tokens that a team shares: its digest, who its holder is, and what all others are told."""

    digest: bytes
    principal: Principal
    refusal: str


class Authenticator:
    """Knows the two shared tokens by their SHA-256 digests only."""

    def __init__(self, api_token: Secret, admin_token: Secret) -> None:
        """The tokens are not kept; the caller should wipe them."""
        self.api = SharedToken(_digest(api_token), Principal("api"), "invalid API token")
        self.admin = SharedToken(_digest(admin_token), Principal("admin"), "invalid admin token")

    def authenticate(self, plane: Plane, token: str, peer: Peer) -> Principal:
        """Who may be served on `plane`, by `token` or by what is known of `peer`; raises `AuthFailedError`."""
        shared = self.api if plane is _DATA else self.admin
        if compare_digest(presented_digest(token), shared.digest):
            return shared.principal
        raise AuthFailedError(shared.refusal)


def _digest(token: Secret) -> bytes:
    with token.view() as view:
        return sha256(view).digest()


def presented_digest(token: str) -> bytes:
    """The SHA-256 of a token that somebody shows; empty for one with a lone surrogate, which no token has."""
    try:
        return sha256(token.encode("utf-8")).digest()
    except UnicodeEncodeError:
        return b""


def authorize(policy: KeyAuthorizationPolicy, principal: Principal, request: Any) -> None:
    """Ask `policy` once for each operation and group that `request` needs; raises `UnauthorizedError`.

    ReEncrypt needs DECRYPT on the group the blob names and RE_ENCRYPT on the destination. A blob that names no group
    raises `DecryptionFailedError`, as it would when opened.
    """
    kind = type(request)
    group: str | None
    if kind is Encrypt or kind is GenerateDataKey:
        group, aad = group_of(request.key_id), request.aad or b""
    elif kind is Decrypt:
        group, aad = ciphertext.group(request.ciphertext), request.aad or b""
    elif kind is ReEncrypt:
        group, aad = group_of(request.key_id), request.aad or b""
        if not policy.allows(principal, Operation.DECRYPT, ciphertext.group(request.ciphertext), aad):
            raise UnauthorizedError(_FORBIDDEN)
    else:
        group, aad = getattr(request, "key_id", None), b""
    if not policy.allows(principal, request.operation, group, aad):
        raise UnauthorizedError(_FORBIDDEN)


_FORBIDDEN: Final = "the policy does not allow this operation on this key group"


class RequestPipeline:
    """From one line to one encoded reply. It never raises: what went wrong is the reply."""

    def __init__(self, handlers: Handlers, authenticator: Authenticator, policy: KeyAuthorizationPolicy) -> None:
        self._data_handlers = handlers.data_plane()
        self._control_handlers = handlers.control_plane()
        self.admit(authenticator, policy)

    def admit(self, authenticator: Authenticator, policy: KeyAuthorizationPolicy) -> None:
        """From now on let these two decide: about new requests, and about changes of keys that still wait."""
        self._authenticator = authenticator
        self._policy = policy

    def caller(self, request: Request, peer: Peer) -> Principal:
        """Who asks, if they may ask it now; raises `AuthFailedError` or `UnauthorizedError`."""
        principal = self._authenticator.authenticate(request.plane, request.token, peer)
        authorize(self._policy, principal, request)
        return principal

    def visible(self, principal: Principal, groups: Sequence[KeyGroup]) -> list[KeyGroup]:
        """Those of `groups` that are in the list that `principal` gets."""
        allows, listing = self._policy.allows, Operation.LIST_KEY_GROUPS
        return [group for group in groups if allows(principal, listing, group.key_id, b"")]

    def serve(self, line: bytes, peer: Peer) -> bytes | Later:
        """The reply line to `line`, without its line end; for the control plane, what to call for it."""
        try:
            request = decode_request(line)
        except UndecodableRequestError as error:
            return self._refuse_undecodable(error, peer)
        if request.plane is not _DATA:
            return partial(self._serve_control, request, peer)
        try:
            authorize(self._policy, self._authenticator.authenticate(_DATA, request.token, peer), request)
            return encode(self._data_handlers[type(request)](request))
        except Exception as error:
            return _failed(request, peer, error)

    async def _serve_control(self, request: Request, peer: Peer) -> bytes:
        try:
            reply = encode(await self._control_handlers[type(request)](request, _Caller(self, request, peer)))
        except Exception as error:
            return _failed(request, peer, error)
        _record(request, peer, "ok")
        return reply

    def frame_too_large(self, limit: int, peer: Peer) -> bytes:
        """The reply to a line over the limit, after which the connection is closed."""
        return _refused(None, peer, FrameTooLargeError(f"a request line has at most {limit} bytes"))

    def _refuse_undecodable(self, error: UndecodableRequestError, peer: Peer) -> bytes:
        if error.kind is None:
            return Rejection(_refused(None, peer, error.reason))
        try:
            self._authenticator.authenticate(error.kind.plane, error.token, peer)
        except AuthFailedError as failure:
            return _refused(error.kind, peer, failure)
        return _refused(error.kind, peer, error.reason)


class _Caller:
    """The `Caller` of one request: its name from when it came, its right to ask looked up anew each time."""

    def __init__(self, pipeline: RequestPipeline, request: Request, peer: Peer) -> None:
        """Raises `AuthFailedError` or `UnauthorizedError`."""
        self._pipeline = pipeline
        self._request = request
        self._peer = peer
        self._principal = pipeline.caller(request, peer)

    def permit(self) -> None:
        self._pipeline.caller(self._request, self._peer)

    def visible(self, groups: Sequence[KeyGroup]) -> list[KeyGroup]:
        return self._pipeline.visible(self._principal, groups)


def _failed(request: Request, peer: Peer, error: Exception) -> bytes:
    """The reply to a request that raised. A bug costs this one reply, not the connection."""
    if isinstance(error, WireError):
        return _refused(request, peer, error)
    log_bug(f"unexpected error in {request.operation.value}", error)
    return _refused(request, peer, InternalError("internal error; the server's log has the details"))


def _refused(request: Request | type[Request] | None, peer: Peer, error: WireError) -> bytes:
    _record(request, peer, error.code)
    reply = encode(ErrorReply(error.code, str(error)))
    return Rejection(reply) if isinstance(error, AuthFailedError) else reply


def log_bug(what: str, error: BaseException) -> None:
    """Log where `error` was raised and its kind, never its text: that could quote a request."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            log_bug(what, part)
        return
    where = "".join(traceback.format_tb(error.__traceback__))
    logging.getLogger(__name__).error("%s: %s\n%s", what, type(error).__name__, where)


def _record(request: Request | type[Request] | None, peer: Peer, outcome: str) -> None:
    operation = "-" if request is None else request.operation.value
    group = getattr(request, "key_id", None) if isinstance(request, Request) else None
    if group is not None and len(group) > MAX_GROUP_NAME_BYTES:
        group = group[:MAX_GROUP_NAME_BYTES] + "..."  # no group has such a name, and a line must not cost a frame
    log.info(
        "connection=%d transport=%s operation=%s group=%r version=%s outcome=%s",
        peer.connection,
        peer.transport,
        operation,
        group,
        getattr(request, "version", "-") if isinstance(request, Request) else "-",
        outcome,
    )
