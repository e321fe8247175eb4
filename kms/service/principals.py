"""The file of principals: who there is besides the two shared tokens, and what each may do.

TOML, read whole and checked before any of it is believed: an unknown key, a value of another type, a name given twice or
a rule that could never do what it seems to say is an error that names its place, such as
`principals.billing.allow[0]: unknown key "group"`. It never shows a value, since where a digest belongs somebody may
have put the token itself. The file holds no secret, but who may write to it may give themselves every key: it has to
be private as a secret is.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from kms import limits
from kms.core.policy import WITH_AAD, Grants, Operation, Rule
from kms.errors import ConfigError, FileAccessError
from kms.host.private import open_private
from kms.service.quotas import DEFAULT, UNLIMITED, Limits

RESERVED_NAMES: Final = {"api": "the shared API token", "admin": "the shared admin token"}
"""What the holders of the shared tokens are called; a principal of that name could not be told from them."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")
_ANY_OPERATION: Final = "*"
_OPERATIONS: Final = {operation.value: operation for operation in Operation if operation is not Operation.HEALTH}
_EMPTY_TOKEN: Final = sha256(b"").digest()
_MAX_QUOTED: Final = 64

_Id = Annotated[int, Meta(ge=0, le=limits.MAX_UNIX_ID)]
_Ids = Annotated[list[_Id], Meta(max_length=limits.MAX_IDS_PER_PRINCIPAL)]
_Globs = Annotated[list[str], Meta(min_length=1, max_length=limits.MAX_GLOBS_PER_RULE)]
_Operations = Annotated[list[str], Meta(min_length=1, max_length=len(Operation))]


class _TokenTable(Struct, forbid_unknown_fields=True):
    digest: str
    expires: Annotated[datetime.datetime, Meta(tz=True)] | None = None


class _DenyTable(Struct, forbid_unknown_fields=True):
    groups: _Globs
    operations: _Operations


class _AllowTable(_DenyTable, forbid_unknown_fields=True):
    aad_prefix: str | None = None


_Count = Annotated[int, Meta(ge=0, le=limits.MAX_LIMIT)]


class _LimitsTable(Struct, forbid_unknown_fields=True):
    requests_per_second: Annotated[float, Meta(gt=0, le=limits.MAX_LIMIT)] | None = None
    groups: _Count | None = None
    versions_per_day: _Count | None = None
    timed_disables: _Count | None = None


class _PrincipalTable(Struct, forbid_unknown_fields=True):
    token_sha256: Annotated[list[str | _TokenTable], Meta(max_length=limits.MAX_TOKENS_PER_PRINCIPAL)] = []
    uids: _Ids = []
    gids: _Ids = []
    allow: Annotated[list[_AllowTable], Meta(max_length=limits.MAX_RULES_PER_PRINCIPAL)] = []
    deny: Annotated[list[_DenyTable], Meta(max_length=limits.MAX_RULES_PER_PRINCIPAL)] = []
    limits: _LimitsTable = msgspec.field(default_factory=_LimitsTable)


class _SharedTable(Struct, forbid_unknown_fields=True):
    api_token: bool | msgspec.UnsetType = msgspec.UNSET
    admin_token: bool | msgspec.UnsetType = msgspec.UNSET

    @property
    def says_something(self) -> bool:
        return self.api_token is not msgspec.UNSET or self.admin_token is not msgspec.UNSET


class _Document(Struct, forbid_unknown_fields=True):
    shared: _SharedTable = msgspec.field(default_factory=_SharedTable)
    # Taken apart one by one: for what stands deeper, msgspec would not say in which of them it stands.
    principals: Annotated[dict[str, Any], Meta(max_length=limits.MAX_PRINCIPALS)] = {}


@dataclass(frozen=True, slots=True)
class TokenDigest:
    """A token that a principal may show: its SHA-256, and the second since 1970 from when it is not taken any more."""

    place: str
    digest: bytes
    expires: float | None


@dataclass(frozen=True, slots=True)
class TeamMember:
    """A principal as the file has it."""

    tokens: tuple[TokenDigest, ...]
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    grants: Grants
    limits: Limits


@dataclass(frozen=True, slots=True)
class Principals:
    """A whole file. `api_token` and `admin_token` say whether the shared tokens are still taken."""

    path: Path
    api_token: bool
    admin_token: bool
    members: Mapping[str, TeamMember]
    sha256: str
    """Of the file's content, in hexadecimal."""


def check_name(name: str) -> None:
    """Raise `ConfigError` unless a principal may be called `name`."""
    if _NAME.fullmatch(name) is None:
        raise ConfigError("a principal's name has 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or digit")
    if name in RESERVED_NAMES:
        raise ConfigError(f"{name} is what the log calls {RESERVED_NAMES[name]}; choose another name")


def load(path: Path) -> Principals:
    """The principals in the file at `path`. Blocking.

    Raises `InputMissingError`, `SecretFileError` for a file that is not private, `FileAccessError`, or `ConfigError` with
    the place of what is wrong.
    """
    with os.fdopen(open_private(path), "rb") as file:
        try:
            raw = file.read(limits.MAX_PRINCIPALS_BYTES + 1)
        except OSError as error:
            raise FileAccessError(f"cannot read {path}: {error.strerror}") from error
    return parse(raw, path)


def parse(raw: bytes, path: Path) -> Principals:
    """The principals in `raw`, the content of the file at `path`; raises `ConfigError`."""
    try:
        return _parse(raw, path)
    except _PlaceError as error:
        raise ConfigError(f"{path}: {error.place}: {error}" if error.place else f"{path}: {error}") from None


class _PlaceError(Exception):
    """What is wrong, and where."""

    def __init__(self, place: str, what: str) -> None:
        super().__init__(what)
        self.place = place


def _parse(raw: bytes, path: Path) -> Principals:
    if len(raw) > limits.MAX_PRINCIPALS_BYTES:
        raise _PlaceError("", f"more than {limits.MAX_PRINCIPALS_BYTES} bytes")
    document = _converted(_toml(raw), _Document, "")
    members = {name: _member(name, table) for name, table in document.principals.items()}
    if not members and not document.shared.says_something:
        # What is left of one that was lost, more likely than what anybody wrote: the shared tokens would do everything.
        raise _PlaceError(
            "",
            "it has no principal, and does not say whether the shared tokens are on. Put the file back; for a team without "
            "principals write [shared] and api_token = true",
        )
    _check_unique(members)
    shared = document.shared
    return Principals(
        path, shared.api_token is not False, shared.admin_token is not False, members, sha256(raw).hexdigest()
    )


def _toml(raw: bytes) -> object:
    try:
        return msgspec.toml.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        # Only where: what could not be read may be a token in the wrong place.
        where = re.search(r"\(at (line \d+, column \d+|end of document)\)$", str(error))
        raise _PlaceError("", f"not TOML, at {where[1]}" if where else "not TOML") from None


def _converted(value: object, kind: type[Any], place: str) -> Any:
    """`value` as a `kind`, or msgspec's complaint with the whole place. It names keys and types, never a value."""
    try:
        return msgspec.convert(value, kind, builtin_types=(datetime.datetime, datetime.date, datetime.time))
    except msgspec.ValidationError as error:
        complaint, _, inside = str(error).partition(" - at `$")
        place = f"{place}{inside.rstrip('`')}".lstrip(".")
        if unknown := re.fullmatch(r"(?s)Object contains unknown field `(.*)`", complaint):
            raise _PlaceError(place, f"unknown key {_quoted(unknown[1])}") from None
        if missing := re.fullmatch(r"Object missing required field `(\w+)`", complaint):
            raise _PlaceError(place, f"{missing[1]} is missing") from None
        raise _PlaceError(
            place, complaint[:1].lower() + complaint[1:].replace("`", "").replace("object", "table")
        ) from None


def _quoted(text: str) -> str:
    """A key as people know it, on one line whatever is in it."""
    return json.dumps(text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}...")


def _member(name: str, value: object) -> TeamMember:
    try:
        check_name(name)
    except ConfigError as error:
        raise _PlaceError(f"principals.{_quoted(name)}", str(error)) from None
    place = f"principals.{name}"
    table = _converted(value, _PrincipalTable, place)
    for kind in ("uids", "gids"):
        for number, one in enumerate(getattr(table, kind)):
            if one == limits.NOBODY_ID:
                raise _PlaceError(f"{place}.{kind}[{number}]", f"{one} is everyone whom a user namespace has no number for")
    grants = Grants(
        [_rule(rule, f"{place}.allow[{number}]") for number, rule in enumerate(table.allow)],
        [_rule(rule, f"{place}.deny[{number}]") for number, rule in enumerate(table.deny)],
    )
    return TeamMember(
        tuple(_token(token, f"{place}.token_sha256[{number}]") for number, token in enumerate(table.token_sha256)),
        tuple(table.uids),
        tuple(table.gids),
        grants,
        _limits(table.limits, UNLIMITED if grants.is_administrator else DEFAULT),
    )


def _limits(table: _LimitsTable, default: Limits) -> Limits:
    said = {name: value for name, value in msgspec.structs.asdict(table).items() if value is not None}
    return replace(default, **said)


def _token(token: str | _TokenTable, place: str) -> TokenDigest:
    digest, expires = (token, None) if isinstance(token, str) else (token.digest, token.expires)
    if _DIGEST.fullmatch(digest) is None:
        raise _PlaceError(place, "not a SHA-256 digest, which is 64 hexadecimal digits; the token itself has no place here")
    octets = bytes.fromhex(digest)
    if octets == _EMPTY_TOKEN:
        raise _PlaceError(place, "the digest of an empty token, which everybody has")
    return TokenDigest(place, octets, None if expires is None else expires.timestamp())


def _rule(table: _DenyTable, place: str) -> Rule:
    for number, glob in enumerate(table.groups):
        if not 1 <= len(glob.encode()) <= limits.MAX_GROUP_NAME_BYTES:
            raise _PlaceError(f"{place}.groups[{number}]", f"has 1 to {limits.MAX_GROUP_NAME_BYTES} bytes")
    operations = _operations(table.operations, f"{place}.operations")
    text = table.aad_prefix if isinstance(table, _AllowTable) else None
    if text is None:
        return Rule(place, tuple(table.groups), operations)
    if not operations <= WITH_AAD:
        raise _PlaceError(f"{place}.aad_prefix", f"only beside operations with an AAD: {', '.join(sorted(WITH_AAD))}")
    return Rule(place, tuple(table.groups), operations, _aad_prefix(text, f"{place}.aad_prefix"))


def _operations(names: Sequence[str], place: str) -> frozenset[Operation]:
    found: set[Operation] = set()
    for number, name in enumerate(names):
        if name == _ANY_OPERATION:
            found.update(_OPERATIONS.values())
        elif name == Operation.HEALTH:
            raise _PlaceError(f"{place}[{number}]", "Health needs no grant: whoever is authenticated may ask it")
        elif name not in _OPERATIONS:
            raise _PlaceError(f"{place}[{number}]", f"not an operation; there are {', '.join(_OPERATIONS)} and *")
        else:
            found.add(_OPERATIONS[name])
    return frozenset(found)


def _aad_prefix(text: str, place: str) -> bytes:
    try:
        prefix = b64decode(text.encode("ascii"), validate=True)
    except ValueError:
        prefix = b""
    if not 1 <= len(prefix) <= limits.MAX_AAD_PREFIX_BYTES or b64encode(prefix).decode("ascii") != text:
        raise _PlaceError(place, f"not canonical base64 of 1 to {limits.MAX_AAD_PREFIX_BYTES} bytes")
    return prefix


def _check_unique(members: Mapping[str, TeamMember]) -> None:
    """Who shows a token, or has a uid, is one principal: no two may claim it."""
    seen: dict[object, str] = {}
    for key, place in _claims(members):
        if (before := seen.setdefault(key, place)) is not place:
            raise _PlaceError(place, f"the same as {before}")


def _claims(members: Mapping[str, TeamMember]) -> Iterator[tuple[object, str]]:
    for name, member in members.items():
        for token in member.tokens:
            yield token.digest, token.place
        for number, uid in enumerate(member.uids):
            yield ("uid", uid), f"principals.{name}.uids[{number}]"
        for number, gid in enumerate(member.gids):
            yield ("gid", gid), f"principals.{name}.gids[{number}]"
