"""The client's side of the protocol, without I/O: what to send, and what a reply means.

A request becomes a `Call`: its line, and how to read its reply. Replies carry no number, they come in request order;
so an `Exchange` holds the calls under way in a queue and gives each reply to the oldest. The rules:

- No more than PIPELINE_DEPTH calls are under way, and no more than about one read's worth of lines is held to be sent.
- A call that is refused stops new calls; the replies still outstanding are awaited, so that the connection stays
  usable, and then the first refusal is raised.
- A call that is throttled was not done. It is sent again after the time that the server says, and half as many are under
  way from then on; when waiting would take longer than `patience` with nothing done meanwhile, it is refused.
- Where a connection breaks, what was not answered may be sent again on another, once (`begin_again`); a change of keys only
  if nothing of it was sent.
- FrameTooLarge is the last thing a server says: the exchange ends there, and with it the connection.
- A reply nobody asked for, too long, of the wrong form, or that names another request is a `ProtocolError`: nothing
  after it can be attributed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import index
from typing import Any, Final, Generic, NamedTuple, SupportsIndex, TypeVar

import msgspec

from kms.client.environment import TokenFile
from kms.core.ciphertext import group as ciphertext_group
from kms.core.secret import Secret
from kms.errors import (
    ConfigError,
    DecryptionFailedError,
    FrameTooLargeError,
    InvalidRequestError,
    KmsError,
    OutcomeUnknownError,
    ProtocolError,
    ThrottledError,
    WireError,
    from_wire,
)
from kms.limits import KEY_BYTES, MAX_REPLY_BYTES, MAX_VERSION, PIPELINE_DEPTH, READ_BYTES
from kms.wire.framing import Framer
from kms.wire.messages import (
    OUTCOME_UNKNOWN,
    REQUEST_ID_RULE,
    CiphertextReply,
    CreateKeyGroup,
    DataKeyReply,
    Decrypt,
    DescribeKeyGroup,
    DestroyVersion,
    DetailReply,
    DisableVersion,
    EnableVersion,
    Encrypt,
    ErrorReply,
    GenerateDataKey,
    GenerateDataKeyWithoutPlaintext,
    GenerateRandom,
    Health,
    KeyGroupReply,
    KeyGroupsReply,
    KeyGroupView,
    ListKeyGroups,
    PlaintextReply,
    ReEncrypt,
    Reload,
    Reply,
    Request,
    RotateKeyGroup,
    Status,
    StatusReply,
    StatusView,
    WrappedDataKeyReply,
    encode,
    group_of,
    is_request_id,
)

R = TypeVar("R", bound=Reply)
T = TypeVar("T")

TokenText = str | bytes | Secret
Token = TokenText | os.PathLike[str] | Callable[[], str | bytes]
"""A token; or the private file that holds it, or what gives it, for each request."""
BytesLike = bytes | bytearray | memoryview


@dataclass(frozen=True)
class DataKey:
    """A fresh data key: `plaintext`, to encrypt with and forget, and `wrapped`, to store beside the data.

    `KmsClient.decrypt(wrapped)` gives the plaintext back, and so does each of `also`, which are wrapped under the other
    key groups that were asked for, in their order.
    """

    plaintext: bytes = field(repr=False)
    wrapped: bytes
    also: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class WrappedDataKey:
    """A fresh data key that nobody has seen: as `DataKey` has it, without the plaintext."""

    wrapped: bytes
    also: tuple[bytes, ...] = ()


class Page(NamedTuple):
    """Some key groups, and what to ask for those after them with; None at the end of the list."""

    groups: list[KeyGroupView]
    next_token: str | None


@dataclass(slots=True)
class Call(Generic[T]):
    """One request: its `line` to send, and `read`, which turns the reply's line into the result or raises its error.

    `changes` says that it asks for a change of keys.
    """

    line: bytes = field(repr=False)
    read: Callable[[bytes], T]
    changes: bool = False


class Requests:
    """Makes the calls of one client; holds its token, and shows it nowhere."""

    __slots__ = ("_request_id", "_source", "_token")

    def __init__(self, token: Token, request_id: str | None = None) -> None:
        """`request_id` is what all of them are called in the server's logs. A `Secret` stays the caller's.

        Raises `ConfigError` when the token is not UTF-8, as JSON cannot carry it then, or for a `request_id` that is none,
        and `TypeError` for what is neither text nor bytes.
        """
        check_text("request_id", request_id, is_optional=True)
        if request_id is not None and not is_request_id(request_id):
            raise ConfigError(REQUEST_ID_RULE)
        self._request_id = request_id
        self._source: Callable[[], str | bytes] | None = None
        self._token = ""
        if isinstance(token, os.PathLike):
            self._source = TokenFile(token)
        elif callable(token):
            self._source = token
        else:
            self._token = _token_text(token)

    def __repr__(self) -> str:
        return "<Requests>"

    def health(self) -> Call[str]:
        return self._call(Health(), _detail)

    def generate_data_key(
        self, key_id: str | None, aad: BytesLike, length: int | None = None, also_key_ids: Sequence[str] = ()
    ) -> Call[DataKey]:
        request = GenerateDataKey(**_data_key_fields(key_id, aad, length, also_key_ids))
        return self._call(request, _data_key if length is None and not also_key_ids else partial(_data_key_of, request))

    def generate_data_key_without_plaintext(
        self, key_id: str | None, aad: BytesLike, length: int | None, also_key_ids: Sequence[str]
    ) -> Call[WrappedDataKey]:
        request = GenerateDataKeyWithoutPlaintext(**_data_key_fields(key_id, aad, length, also_key_ids))
        return self._call(request, _wrapped_data_key)

    def generate_random(self, length: int) -> Call[bytes]:
        return self._call(GenerateRandom(length=_number("length", length)), _plaintext)

    def encrypt(self, plaintext: BytesLike, key_id: str | None, aad: BytesLike) -> Call[bytes]:
        check_text("key_id", key_id, is_optional=True)
        request = Encrypt(plaintext=octets("plaintext", plaintext), key_id=key_id, aad=octets("aad", aad) or None)
        return self._call(request, _ciphertext)

    def decrypt(self, ciphertext: BytesLike, aad: BytesLike, source_key_id: str | None = None) -> Call[bytes]:
        blob = _from_source(ciphertext, source_key_id)
        request = Decrypt(ciphertext=blob, source_key_id=source_key_id, aad=octets("aad", aad) or None)
        return self._call(request, _plaintext)

    def reencrypt(
        self, ciphertext: BytesLike, key_id: str, aad: BytesLike, source_key_id: str | None = None
    ) -> Call[bytes]:
        check_text("key_id", key_id)
        blob, aad = _from_source(ciphertext, source_key_id), octets("aad", aad)
        request = ReEncrypt(ciphertext=blob, source_key_id=source_key_id, key_id=key_id, aad=aad or None)
        return self._call(request, _ciphertext)

    def create_key_group(self, key_id: str) -> Call[KeyGroupView]:
        check_text("key_id", key_id)
        return self._call(CreateKeyGroup(key_id=key_id), _key_group)

    def rotate_key_group(self, key_id: str) -> Call[KeyGroupView]:
        check_text("key_id", key_id)
        return self._call(RotateKeyGroup(key_id=key_id), _key_group)

    def list_key_groups(self, usage: bool) -> Call[list[KeyGroupView]]:  # noqa: FBT001 - what `KmsClient` calls by name
        _check_flag("usage", usage)
        return self._call(ListKeyGroups(usage=usage), _key_groups)

    def page_of_key_groups(
        self,
        usage: bool,  # noqa: FBT001 - what `KmsClient` calls by name
        page_size: int,
        next_token: str | None,
    ) -> Call[Page]:
        _check_flag("usage", usage)
        request = ListKeyGroups(usage=usage, limit=_number("page_size", page_size), next_token=next_token)
        return self._call(request, partial(_page, next_token))

    def describe_key_group(self, key_id: str) -> Call[KeyGroupView]:
        check_text("key_id", key_id)
        return self._call(DescribeKeyGroup(key_id=key_id), _key_group)

    def status(self) -> Call[StatusView]:
        return self._call(Status(), _status)

    def reload(self) -> Call[str]:
        return self._call(Reload(), _detail)

    def disable_version(self, key_id: str, version: int, for_seconds: int | None) -> Call[str]:
        check_text("key_id", key_id)
        seconds = None if for_seconds is None else _number("for_seconds", for_seconds)
        request = DisableVersion(key_id=key_id, version=_number("version", version), for_seconds=seconds)
        return self._call(request, _detail if for_seconds is None else _timed_detail)

    def enable_version(self, key_id: str, version: int) -> Call[str]:
        check_text("key_id", key_id)
        return self._call(EnableVersion(key_id=key_id, version=_number("version", version)), _detail)

    def destroy_version(self, key_id: str, version: int) -> Call[str]:
        check_text("key_id", key_id)
        return self._call(DestroyVersion(key_id=key_id, version=_number("version", version)), _detail)

    def _call(self, request: Request, read: Callable[[str | None, bytes], T]) -> Call[T]:
        request.token = self._token if self._source is None else _token_text(self._source())
        request.request_id = self._request_id
        try:
            return Call(encode(request) + b"\n", partial(read, self._request_id), request.changes)
        except UnicodeEncodeError:
            # A name with a lone surrogate, which is what Python makes of a bad byte on the command line.
            raise InvalidRequestError("keyId: not UTF-8 text") from None


def _token_text(token: TokenText) -> str:
    """A token as text, without one line end: that of a file which was read whole."""
    try:
        if isinstance(token, str):
            token.encode("utf-8")
            text = token
        elif isinstance(token, bytes):
            text = token.decode("utf-8")
        elif isinstance(token, Secret):
            with token.view() as view:
                text = str(view, "utf-8")
        else:
            raise TypeError(f"token has to be str or bytes, not {type(token).__name__}")
    except UnicodeError:
        raise ConfigError("the token is not UTF-8 text; is it the right file?") from None
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


class Exchange(Generic[T]):
    """The state of some calls on one connection; the module's docstring has its rules.

    Whoever does the I/O sends what `outgoing` returns, reports it with `sent`, hands what it reads to `received`,
    until `is_done`, and then takes `results`.
    """

    def __init__(self, calls: Iterable[Call[T]], *, depth: int = PIPELINE_DEPTH, patience: float = 0.0) -> None:
        """`patience` is for how many seconds of waiting, with nothing done, a throttled call is sent again."""
        self._calls = enumerate(calls)
        self._depth = depth
        self._under_way: deque[tuple[int, Call[T]]] = deque()
        self._again: deque[tuple[int, Call[T]]] = deque()
        self._framer = Framer(MAX_REPLY_BYTES)
        self._unsent = memoryview(b"")
        self._has_more = True
        self._results: dict[int, T] = {}
        self._error: Exception | None = None
        self._patience = patience
        self._waited = 0.0
        self._pause = 0.0
        self._has_sent = False
        self._is_stuck = False
        self._is_repeated = False
        self.is_over = False
        """The server ends the connection after this exchange."""

    @property
    def is_done(self) -> bool:
        to_send = self._unsent or ((self._has_more or self._again) and not self._is_stuck)
        return self.is_over or not (to_send or self._under_way)

    @property
    def pause(self) -> float:
        """For how many seconds to wait, and then call `resume`; 0 when there is nothing to wait for but the server."""
        return 0.0 if self._under_way else self._pause

    def resume(self) -> None:
        """The pause is over."""
        self._waited += self._pause
        self._pause = 0.0

    def outgoing(self) -> memoryview:
        """What to send next; empty when there is nothing, or when replies must come first."""
        if not self._unsent and not self._pause and not self._is_stuck and (self._has_more or self._again):
            self._unsent = memoryview(b"".join(self._next_lines()))
        return self._unsent

    def sent(self, count: int) -> None:
        """The first `count` bytes of `outgoing` have been sent."""
        self._unsent = self._unsent[count:]
        self._has_sent = self._has_sent or count > 0

    @property
    def may_have_changed(self) -> bool:
        """Whether a change of keys is under way, of which the server may have got the request, or a part of it."""
        return self._has_sent and any(call.changes for _, call in self._under_way)

    def stop_sending(self) -> None:
        """Nothing can be sent any more; replies may still be on their way."""
        self._unsent = memoryview(b"")
        self._is_stuck = True

    def begin_again(self) -> bool:
        """The connection broke: be ready to send what was not answered on another. False where that must not be.

        A request that changes nothing may be counted and recorded twice then. One that changes keys is not sent twice.
        """
        if self._is_repeated or self._error is not None or self.may_have_changed:
            return False
        self._is_repeated = True
        self._again.extendleft(reversed(self._under_way))
        self._under_way.clear()
        self._unsent = memoryview(b"")
        self._framer = Framer(MAX_REPLY_BYTES)
        self._is_stuck = self._has_sent = False
        self._pause = 0.0
        return True

    @property
    def answered(self) -> int:
        """How many calls have their results."""
        return len(self._results)

    def received(self, data: bytes) -> None:
        """Take what was read; raises `ProtocolError`, after which the connection is of no use."""
        for line in self._framer.feed(data):
            if not self._under_way:
                raise ProtocolError("the server sent a reply that nobody asked for")
            number, call = self._under_way.popleft()
            try:
                self._results[number] = call.read(line)
                self._waited = 0.0
            except ThrottledError as error:
                self._throttle(number, call, error)
            except FrameTooLargeError as error:
                self._refuse(error)
                self.is_over = True
                return
            except (WireError, OutcomeUnknownError) as error:
                self._refuse(error)
        if self._framer.too_large:
            raise ProtocolError(f"the server sent a reply of more than {MAX_REPLY_BYTES} bytes")
        if self._framer.is_mid_frame and not self._under_way:
            raise ProtocolError("the server sent a reply that nobody asked for")

    def results(self) -> list[T]:
        """The results in the order of the calls; raises the first error instead when there was one."""
        if self._error is not None:
            raise self._error
        return [self._results[number] for number in sorted(self._results)]

    def _next_lines(self) -> list[bytes]:
        lines: list[bytes] = []
        size = 0
        try:
            while size < READ_BYTES and len(self._under_way) < self._depth:
                numbered = self._again.popleft() if self._again else next(self._calls, None)
                if numbered is None:
                    self._has_more = False
                    break
                self._under_way.append(numbered)
                lines.append(numbered[1].line)
                size += len(numbered[1].line)
        except Exception as error:
            # Raised by the caller's iterable: what is under way must still be answered before it goes on to the caller.
            self._refuse(error)
        return lines

    def _throttle(self, number: int, call: Call[T], error: ThrottledError) -> None:
        pause = max(self._pause, error.retry_after)
        if self._error is not None or self._waited + pause > self._patience:
            self._refuse(error)
            return
        if not self._pause:
            self._depth = max(1, self._depth // 2)
        self._pause = pause
        self._again.append((number, call))

    def _refuse(self, error: Exception) -> None:
        self._has_more = False
        self._pause = 0.0
        self._again.clear()
        if self._error is None:
            self._error = error


def octets(name: str, value: BytesLike) -> bytes:
    """`value` as bytes, or `TypeError`. Text is not taken: whether it was meant as itself or as base64, nobody knows."""
    if type(value) is bytes:
        return value
    if isinstance(value, BytesLike):
        return bytes(value)
    hint = '; encode it, as in "text".encode()' if isinstance(value, str) else ""
    raise TypeError(f"{name} has to be bytes, not {type(value).__name__}{hint}")


def check_text(name: str, value: object, *, is_optional: bool = False) -> None:
    if not (isinstance(value, str) or (is_optional and value is None)):
        raise TypeError(f"{name} has to be str{' or None' if is_optional else ''}, not {type(value).__name__}")


def texts(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """`values` as they are, or `TypeError`. A single text is not taken for its characters."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} has to be several str, not {type(values).__name__}")
    checked = tuple(values)
    for one in checked:
        check_text(name, one)
    return checked


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} has to be bool, not {type(value).__name__}")


def _number(name: str, value: SupportsIndex) -> int:
    """`value` as an int, or `TypeError`; `InvalidRequestError` for one that no request can carry."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} has to be int, not {type(value).__name__}")
    number = index(value)
    if abs(number) > MAX_VERSION:
        raise InvalidRequestError(f"{name}: out of range")
    return number


def _data_key_fields(
    key_id: str | None, aad: BytesLike, length: SupportsIndex | None, also_key_ids: Sequence[str]
) -> dict[str, Any]:
    check_text("key_id", key_id, is_optional=True)
    return {
        "key_id": key_id,
        "aad": octets("aad", aad) or None,
        "length": None if length is None else _number("length", length),
        "also_key_ids": list(texts("also_key_ids", also_key_ids)) or None,
    }


def _from_source(ciphertext: BytesLike, source_key_id: str | None) -> bytes:
    """`ciphertext`; `DecryptionFailedError` unless it names the group `source_key_id`: an older server would not look."""
    blob = octets("ciphertext", ciphertext)
    check_text("source_key_id", source_key_id, is_optional=True)
    if source_key_id is not None and ciphertext_group(blob) != group_of(source_key_id):
        raise DecryptionFailedError
    return blob


def _detail(request_id: str | None, line: bytes) -> str:
    return _decoded(_detail_decoder, request_id, line).detail


def _timed_detail(request_id: str | None, line: bytes) -> str:
    reply = _decoded(_detail_decoder, request_id, line)
    if reply.until_epoch_sec is None:
        # It ignores what it does not know.
        raise ProtocolError(
            "the server is too old to disable a version for a time: it has disabled it for good; enable it again yourself"
        )
    return reply.detail


def _data_key(request_id: str | None, line: bytes) -> DataKey:
    reply = _decoded(_data_key_decoder, request_id, line)
    return DataKey(reply.plaintext_data_key, reply.wrapped_data_key, tuple(reply.wrapped_data_keys or ()))


def _data_key_of(request: GenerateDataKey, request_id: str | None, line: bytes) -> DataKey:
    """The same of more than the usual, which an older server would not know of."""
    key = _data_key(request_id, line)
    if len(key.plaintext) != (KEY_BYTES if request.length is None else request.length):
        raise ProtocolError("the server is too old to make data keys of another length")
    if len(key.also) != len(request.also_key_ids or ()):
        raise ProtocolError("the server is too old to wrap a data key under several key groups")
    return key


def _wrapped_data_key(request_id: str | None, line: bytes) -> WrappedDataKey:
    reply = _decoded(_wrapped_data_key_decoder, request_id, line)
    return WrappedDataKey(reply.wrapped_data_key, tuple(reply.wrapped_data_keys or ()))


def _ciphertext(request_id: str | None, line: bytes) -> bytes:
    return _decoded(_ciphertext_decoder, request_id, line).ciphertext


def _plaintext(request_id: str | None, line: bytes) -> bytes:
    return _decoded(_plaintext_decoder, request_id, line).plaintext


def _status(request_id: str | None, line: bytes) -> StatusView:
    return _decoded(_status_decoder, request_id, line).report


def _key_group(request_id: str | None, line: bytes) -> KeyGroupView:
    return _decoded(_key_group_decoder, request_id, line).key_group


def _key_groups(request_id: str | None, line: bytes) -> list[KeyGroupView]:
    return _decoded(_key_groups_decoder, request_id, line).key_groups


def _page(asked_with: str | None, request_id: str | None, line: bytes) -> Page:
    # A server that knows no pages sends the whole list.
    reply = _decoded(_key_groups_decoder, request_id, line)
    if reply.next_token is not None and (reply.next_token == asked_with or not reply.key_groups):
        raise ProtocolError("the server's list of key groups does not come to an end")
    return Page(reply.key_groups, reply.next_token)


_detail_decoder: Final[msgspec.json.Decoder[DetailReply | ErrorReply]] = msgspec.json.Decoder(DetailReply | ErrorReply)
_data_key_decoder: Final[msgspec.json.Decoder[DataKeyReply | ErrorReply]] = msgspec.json.Decoder(DataKeyReply | ErrorReply)
_wrapped_data_key_decoder: Final[msgspec.json.Decoder[WrappedDataKeyReply | ErrorReply]] = msgspec.json.Decoder(
    WrappedDataKeyReply | ErrorReply
)
_ciphertext_decoder: Final[msgspec.json.Decoder[CiphertextReply | ErrorReply]] = msgspec.json.Decoder(
    CiphertextReply | ErrorReply
)
_plaintext_decoder: Final[msgspec.json.Decoder[PlaintextReply | ErrorReply]] = msgspec.json.Decoder(
    PlaintextReply | ErrorReply
)
_status_decoder: Final[msgspec.json.Decoder[StatusReply | ErrorReply]] = msgspec.json.Decoder(StatusReply | ErrorReply)
_key_group_decoder: Final[msgspec.json.Decoder[KeyGroupReply | ErrorReply]] = msgspec.json.Decoder(
    KeyGroupReply | ErrorReply
)
_key_groups_decoder: Final[msgspec.json.Decoder[KeyGroupsReply | ErrorReply]] = msgspec.json.Decoder(
    KeyGroupsReply | ErrorReply
)


def _decoded(decoder: msgspec.json.Decoder[R | ErrorReply], request_id: str | None, line: bytes) -> R:
    try:
        reply = decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # Not chained: the error may show a part of the reply.
        raise ProtocolError("the server's reply is not of this protocol; is it a mini-kms server?") from None
    # A server that knows of no such thing repeats none.
    if reply.request_id is not None and reply.request_id != request_id:
        raise ProtocolError("the server answered another request than this one; connect again")
    if isinstance(reply, ErrorReply):
        after = reply.retry_after_ms
        error: KmsError = from_wire(
            reply.error_code,
            reply.message,
            None if after is None else after / 1000,
            is_outcome_known=reply.outcome != OUTCOME_UNKNOWN,
        )
        raise error
    return reply
