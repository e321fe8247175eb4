"""Requests and replies: one struct each, and the codecs both sides share.

A request is an object tagged by `type`, a reply one tagged by `status`; binary fields are standard base64. Decoding
is strict where msgspec is lenient: the line must be UTF-8 as a whole (msgspec skips the bytes of unknown fields),
base64 must be canonical (msgspec ignores the unused bits before the padding), and nesting has a bound of its own
(msgspec's is the interpreter's, which differs by version; should it come first, its RecursionError is a refusal too).
"""

from __future__ import annotations

import re
from base64 import b64encode
from enum import StrEnum
from itertools import accumulate
from typing import Annotated, ClassVar, Final

import msgspec
from msgspec import Meta, Struct, field

from kms.core.names import is_blank
from kms.core.policy import Operation, Plane
from kms.core.usage import VersionUsage
from kms.errors import InvalidRequestError
from kms.limits import (
    DEFAULT_KEY_GROUP,
    MAX_DATA_KEY_BYTES,
    MAX_LIST_LIMIT,
    MAX_NESTING,
    MAX_RECIPIENTS,
    MAX_REQUEST_ID_CHARACTERS,
    MAX_TIMED_DISABLE_SECONDS,
    MAX_VERSION,
)

Version = Annotated[int, Meta(ge=1, le=MAX_VERSION)]


class Request(Struct, tag_field="type", rename="camel", kw_only=True):
    """What every request has. `token` is never shown; `request_id` comes back in the reply, for the client's own use."""

    operation: ClassVar[Operation]
    plane: ClassVar[Plane]
    changes: ClassVar[bool] = False
    """Whether it asks for a change of keys, which must not be made twice unseen."""

    token: str = ""
    request_id: str | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class DataRequest(Request, rename="camel", kw_only=True):
    plane: ClassVar[Plane] = Plane.DATA


class ControlRequest(Request, rename="camel", kw_only=True):
    plane: ClassVar[Plane] = Plane.CONTROL


class Health(DataRequest, tag="Health"):
    operation: ClassVar[Operation] = Operation.HEALTH


class Ping(Health, tag="Ping"):
    """Another name for Health."""


class GenerateDataKey(DataRequest, tag="GenerateDataKey", rename="camel", kw_only=True):
    operation: ClassVar[Operation] = Operation.GENERATE_DATA_KEY
    key_id: str | None = None
    aad: bytes | None = None
    length: Annotated[int, Meta(ge=1, le=MAX_DATA_KEY_BYTES)] | None = field(default=None, name="bytes")
    """32 where it is not given."""
    also_key_ids: Annotated[list[str], Meta(max_length=MAX_RECIPIENTS - 1)] | None = None
    """Key groups under which it is wrapped as well."""


class GenerateDataKeyWithoutPlaintext(GenerateDataKey, tag="GenerateDataKeyWithoutPlaintext"):
    """For who stores it now, and opens it later or elsewhere."""

    operation: ClassVar[Operation] = Operation.GENERATE_DATA_KEY_WITHOUT_PLAINTEXT


class GenerateRandom(DataRequest, tag="GenerateRandom", rename="camel", kw_only=True):
    operation: ClassVar[Operation] = Operation.GENERATE_RANDOM
    length: Annotated[int, Meta(ge=1, le=MAX_DATA_KEY_BYTES)] = field(name="bytes")


class Encrypt(DataRequest, tag="Encrypt", rename="camel", kw_only=True):
    operation: ClassVar[Operation] = Operation.ENCRYPT
    plaintext: bytes
    key_id: str | None = None
    aad: bytes | None = None


class Decrypt(DataRequest, tag="Decrypt", rename="camel", kw_only=True):
    operation: ClassVar[Operation] = Operation.DECRYPT
    ciphertext: bytes
    source_key_id: str | None = None
    """The only group that the ciphertext may name: whoever wrote it has chosen which."""
    aad: bytes | None = None


class ReEncrypt(DataRequest, tag="ReEncrypt", rename="camel", kw_only=True):
    operation: ClassVar[Operation] = Operation.RE_ENCRYPT
    ciphertext: bytes
    source_key_id: str | None = None
    key_id: str | None = None
    aad: bytes | None = None


class GroupRequest(ControlRequest, rename="camel", kw_only=True):
    key_id: str


class VersionRequest(GroupRequest, rename="camel", kw_only=True):
    changes: ClassVar[bool] = True
    version: Version


class CreateKeyGroup(GroupRequest, tag="CreateKeyGroup"):
    operation: ClassVar[Operation] = Operation.CREATE_KEY_GROUP
    changes: ClassVar[bool] = True


class RotateKeyGroup(GroupRequest, tag="RotateKeyGroup"):
    operation: ClassVar[Operation] = Operation.ROTATE_KEY_GROUP
    changes: ClassVar[bool] = True


class ListKeyGroups(ControlRequest, tag="ListKeyGroups", rename="camel", kw_only=True):
    """With `usage`, also how the versions are used, of groups that the caller may describe.

    With `limit` a page, of at most so many groups, after the one that ended with `next_token`.
    """

    operation: ClassVar[Operation] = Operation.LIST_KEY_GROUPS
    usage: bool = False
    limit: Annotated[int, Meta(ge=1, le=MAX_LIST_LIMIT)] | None = None
    next_token: str | None = None


class DescribeKeyGroup(GroupRequest, tag="DescribeKeyGroup"):
    operation: ClassVar[Operation] = Operation.DESCRIBE_KEY_GROUP


class DisableVersion(VersionRequest, tag="DisableVersion", rename="camel", kw_only=True):
    """For good, or `for_seconds`: the server enables it again by itself then."""

    operation: ClassVar[Operation] = Operation.DISABLE_VERSION
    for_seconds: Annotated[int, Meta(ge=1, le=MAX_TIMED_DISABLE_SECONDS)] | None = None


class EnableVersion(VersionRequest, tag="EnableVersion"):
    operation: ClassVar[Operation] = Operation.ENABLE_VERSION


class DestroyVersion(VersionRequest, tag="DestroyVersion"):
    operation: ClassVar[Operation] = Operation.DESTROY_VERSION


class Status(ControlRequest, tag="Status"):
    """Who the caller is and what it may do, and how the server is, for who may see that."""

    operation: ClassVar[Operation] = Operation.STATUS


class Reload(ControlRequest, tag="Reload"):
    """What SIGHUP asks for, with an answer."""

    operation: ClassVar[Operation] = Operation.RELOAD


AnyRequest = (
    Health
    | Ping
    | GenerateDataKey
    | GenerateDataKeyWithoutPlaintext
    | GenerateRandom
    | Encrypt
    | Decrypt
    | ReEncrypt
    | CreateKeyGroup
    | RotateKeyGroup
    | ListKeyGroups
    | DescribeKeyGroup
    | DisableVersion
    | EnableVersion
    | DestroyVersion
    | Status
    | Reload
)


class VersionState(StrEnum):
    """The state of a version. UNKNOWN is one of a server that is newer than this client."""

    ACTIVE = "ACTIVE"
    ENABLED = "ENABLED"
    DISABLED = "DISABLED"
    DESTROYED = "DESTROYED"
    UNKNOWN = "UNKNOWN"

    @classmethod
    def _missing_(cls, value: object) -> VersionState | None:
        return cls.UNKNOWN if isinstance(value, str) else None


class VersionView(Struct, rename="camel", omit_defaults=True):
    """A KEK version as people see it; `created_at_epoch_sec` is seconds since 1970, `usage` for who asked for it."""

    version: int
    status: VersionState
    created_at_epoch_sec: int
    usage: VersionUsage | None = None


class KeyGroupView(Struct, rename="camel"):
    """A key group as people see it."""

    key_id: str
    active_version: int
    versions: list[VersionView]


class RuleView(Struct, rename="camel", omit_defaults=True):
    """A rule of a principal as people see it: `allow` or not, operations by the names of requests, groups as globs."""

    allow: bool
    operations: list[str]
    groups: list[str]
    aad_prefix: bytes = b""


class ServerView(Struct, rename="camel", omit_defaults=True, kw_only=True):
    """How a server is: where it listens, its files, and `warnings` for people. `audit_data` is what of the data plane."""

    listening: list[str]
    keystore: str
    generation: int
    key_groups: int
    principals: str
    audit_log: str | None = None
    audit_data: str | None = None
    memory_locked: bool
    metrics: str | None = None
    warnings: list[str] = []


class StatusView(Struct, rename="camel", omit_defaults=True, kw_only=True):
    """Who the caller is to the server, and what it may do: `rules` is None where that is everything.

    `server` is for who may see it. `uptime_sec` is in seconds.
    """

    version: str
    uptime_sec: int
    principal: str
    rules: list[RuleView] | None = None
    server: ServerView | None = None


class Reply(Struct, tag_field="status", rename="camel", kw_only=True, omit_defaults=True):
    """What every reply is: `status` ok or error, the fields of its kind, and the `request_id` of a request that had one."""

    request_id: str | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class DetailReply(Reply, tag="ok", rename="camel"):
    """`until_epoch_sec` is when what was done for a time ends."""

    detail: str
    until_epoch_sec: int | None = None


class DataKeyReply(Reply, tag="ok", rename="camel"):
    """`wrapped_data_keys` are those of `also_key_ids`, in their order."""

    plaintext_data_key: bytes
    wrapped_data_key: bytes
    wrapped_data_keys: list[bytes] | None = None


class WrappedDataKeyReply(Reply, tag="ok", rename="camel"):
    """The same without what was wrapped."""

    wrapped_data_key: bytes
    wrapped_data_keys: list[bytes] | None = None


class CiphertextReply(Reply, tag="ok"):
    ciphertext: bytes


class PlaintextReply(Reply, tag="ok"):
    plaintext: bytes


class StatusReply(Reply, tag="ok", rename="camel"):
    report: StatusView


class KeyGroupReply(Reply, tag="ok", rename="camel"):
    key_group: KeyGroupView


class KeyGroupsReply(Reply, tag="ok", rename="camel"):
    """With `next_token` there are more, for who asks for them with it."""

    key_groups: list[KeyGroupView]
    next_token: str | None = None


OUTCOME_UNKNOWN: Final = "unknown"


class ErrorReply(Reply, tag="error", rename="camel"):
    """`retry_after_ms`, of what was asked for too often, is after how many milliseconds it may be asked again.

    `outcome` is OUTCOME_UNKNOWN for a change that may have been made all the same.
    """

    error_code: str
    message: str
    retry_after_ms: Annotated[int, Meta(ge=0)] | None = None
    outcome: str | None = None


class _Head(Struct):
    """What is looked at when a request does not decode: who asks comes before what is wrong.

    Raw, so that nothing but a string is ever built of them: a stranger could put a megabyte of costly numbers there.
    """

    type: msgspec.Raw = msgspec.Raw()
    token: msgspec.Raw = msgspec.Raw()
    requestId: msgspec.Raw = msgspec.Raw()  # noqa: N815 - the wire's own name


class _BinaryTexts(Struct):
    """The binary fields as they stand in the line. Raw, so that of a field some request ignores nothing is decoded."""

    plaintext: msgspec.Raw = msgspec.Raw()
    ciphertext: msgspec.Raw = msgspec.Raw()
    aad: msgspec.Raw = msgspec.Raw()


_encoder: Final = msgspec.json.Encoder()
_request_decoder: Final = msgspec.json.Decoder(AnyRequest)
_head_decoder: Final = msgspec.json.Decoder(_Head)
_texts_decoder: Final = msgspec.json.Decoder(_BinaryTexts)
_text_decoder: Final = msgspec.json.Decoder(str)
_request_types: Final[dict[str, type[Request]]] = {kind.__struct_config__.tag: kind for kind in AnyRequest.__args__}

encode = _encoder.encode
"""A request or reply as one JSON line, without its line end."""


class UndecodableRequestError(Exception):
    """A request that failed to decode, with what can still be said of it.

    `kind` is its type, `token` what it presented and `request_id` what its client calls it, all as far as they could be
    read; `reason` is for the client once it has been authenticated.
    """

    def __init__(
        self, kind: type[Request] | None, token: str, reason: InvalidRequestError, request_id: str | None = None
    ) -> None:
        super().__init__(str(reason))
        self.kind = kind
        self.token = token
        self.reason = reason
        self.request_id = request_id


def decode_request(line: bytes) -> Request:
    """The request in `line`; raises `UndecodableRequestError`."""
    # Without an array or a second object nothing nests. Looked for before counted: 0.1 us against 3.4 us at 4 KiB.
    if (_ARRAY in line or line.find(b"{", 1) >= 0) and _nests_too_deeply(line):
        raise UndecodableRequestError(None, "", InvalidRequestError("nested too deeply"))
    try:
        if not line.isascii():
            line.decode("utf-8")
        request: Request = _request_decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _undecodable(line, error) from None
    if request.request_id is not None and not is_request_id(request.request_id):
        raise UndecodableRequestError(type(request), request.token, InvalidRequestError(REQUEST_ID_RULE))
    # A backslash, too: the padding may be escaped.
    padding = line.find(b"=")
    if _BACKSLASH in line or (padding >= 0 and _LOOSE_PADDING.search(line, padding)):
        field = _non_canonical_field(request, line)
        if field is not None:
            reason = InvalidRequestError(f"{field}: not canonical base64")
            raise UndecodableRequestError(type(request), request.token, reason, request.request_id)
    return request


def presented(line: bytes) -> tuple[type[Request], str] | None:
    """Of which type the request in `line` is, and the token that it shows; None where that cannot be told.

    It decodes nothing else, so that a long line costs a stranger's server little: 1 ms for a MiB, instead of 15.
    """
    try:
        head = _head_decoder.decode(line)
        kind, token = _request_types.get(_text(head.type)), _text(head.token)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return None if kind is None else (kind, token)


def group_of(key_id: str | None) -> str:
    """The group a data request names: omitted, null or blank is `default`."""
    return DEFAULT_KEY_GROUP if key_id is None or is_blank(key_id) else key_id


REQUEST_ID_RULE: Final = f"requestId: has 1 to {MAX_REQUEST_ID_CHARACTERS} printable characters"


def is_request_id(text: str) -> bool:
    """Whether a request may be called `text`."""
    # It goes into logs, where a line end or an escape would be another's line.
    return 1 <= len(text) <= MAX_REQUEST_ID_CHARACTERS and text.isprintable()


_ARRAY: Final = ord("[")
_BACKSLASH: Final = ord("\\")
"""As numbers, since `int in bytes` takes 0.04 us where `bytes in bytes` takes 0.17."""

_LOOSE_PADDING: Final = re.compile(rb'="(?<![AQgw]==")(?<![AEIMQUYcgkosw048]=")')
"""The end of a string that may be base64 with unused bits set; it need not be a binary field.

It begins with what it looks for and only then looks back: with the alternatives in front it had to be tried at every
byte, which took 174 us instead of 1.7 at 4 KiB. Begun at the first `=` it takes 0.3, as that stands at the value's end.
"""


def _non_canonical_field(request: Request, line: bytes) -> str | None:
    texts = _texts_decoder.decode(line)
    for name in ("plaintext", "ciphertext", "aad"):
        value = getattr(request, name, None)
        if value is not None and _text_decoder.decode(getattr(texts, name)) != b64encode(value).decode("ascii"):
            return name
    return None


_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")


def _nests_too_deeply(line: bytes) -> bool:
    if line.count(b"[") + line.count(b"{") <= MAX_NESTING:
        return False
    # Without what is escaped each quote begins a string or ends one; one that never ends reaches to the end of the line.
    # By a regular expression the strings of a megabyte took 40 ms; an expression that backtracks, an hour.
    if _BACKSLASH in line:
        line = line.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(line.split(b'"')[::2])
    # Each opening bracket as the signed byte 1, each closing one as -1: their running sum is the depth.
    steps = outside.translate(_STEPS, delete=_NO_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0) > MAX_NESTING


def _undecodable(line: bytes, error: Exception) -> UndecodableRequestError:
    if isinstance(error, UnicodeDecodeError):
        return UndecodableRequestError(None, "", InvalidRequestError("not strict UTF-8"))
    try:
        head = _head_decoder.decode(line)
        token, name, request_id = _text(head.token), _text(head.type), _text(head.requestId)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return UndecodableRequestError(None, "", InvalidRequestError("not a JSON object"))
    kind = _request_types.get(name)
    if kind is None:
        reason = "type: missing" if bytes(head.type) in (b"", b"null") else "type: unknown request type"
    else:
        reason = _rule(str(error))
    return UndecodableRequestError(
        kind, token, InvalidRequestError(reason), request_id if is_request_id(request_id) else None
    )


def _text(raw: msgspec.Raw) -> str:
    """The string that `raw` is; empty for anything else."""
    return _text_decoder.decode(raw) if bytes(raw).startswith(b'"') else ""


_MISSING: Final = re.compile(r"Object missing required field `(\w+)`")
_AT_FIELD: Final = re.compile(r"(?s)(.*) - at `\$\.(\w+)(?:\[[^\]]*\])?`")


def _rule(complaint: str) -> str:
    """msgspec's complaint as `field: rule`. It names types and bounds, and of values only a second `type`, no secret."""
    if missing := _MISSING.match(complaint):
        return f"{missing[1]}: missing"
    if at_field := _AT_FIELD.match(complaint):
        return f"{at_field[2]}: {at_field[1].replace('`', '')}".replace(" | null", "")
    return "not JSON of the form this request has"
