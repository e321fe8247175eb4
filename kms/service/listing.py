"""Key groups as people see them: one, and the list of them. Both are made while they are sent.

A list may be of a hundred thousand groups, and a group of ten thousand versions, and as many may ask for them as there are
connections: made whole, thirty lists took gigabytes, and each stopped all others for a second. So they are made in pieces,
each when the one before it is sent, and others have their turn between them. A list is of the groups that there were when
it was asked for, and shows those that its reader may see when their piece is made.

A page is a list with a bound: of groups, and of bytes, as one group may be long. Where there is more to see, it ends with
a token: the name of its last group, for whoever asks for the next page. A name that its reader may not see is no token, or
it would tell whether there is such a group.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import islice
from typing import Final, Protocol

import trio

from kms.core.keyring import KeyGroup, VersionStatus
from kms.core.policy import Operation
from kms.core.provider import UsageKeeper
from kms.errors import InvalidRequestError
from kms.limits import LIST_PAGE_BYTES, READ_BYTES
from kms.wire import messages
from kms.wire.messages import KeyGroupReply, KeyGroupsReply, KeyGroupView, Reply, VersionState, VersionView, encode

_PIECE: Final = 200
"""Groups and versions that are put into a reply before others have their turn: some 0.2 ms."""

_LIST = Operation.LIST_KEY_GROUPS
_DESCRIBE = Operation.DESCRIBE_KEY_GROUP


class LongReply(Protocol):
    """A reply that is made while it is sent."""

    @property
    def summary(self) -> Reply:
        """What it begins and ends with, and nothing of what may be long: for the record, and whoever watches."""
        ...

    def pieces(self) -> AsyncGenerator[bytes, None]:
        """Its line, without the end."""
        ...


class Reader(Protocol):
    """Who asks for a list."""

    def allowed(self, operation: Operation, groups: Sequence[KeyGroup]) -> list[KeyGroup]:
        """Those of `groups` on which the principal may use `operation`."""
        ...


class Description:
    """The reply about one key group. With `usage` it tells also how the versions are used."""

    def __init__(self, group: KeyGroup, request_id: str | None, usage: UsageKeeper | None = None) -> None:
        self._group = group
        self._usage = usage
        self.summary: Final = KeyGroupReply(_without_versions(group), request_id=request_id)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Its line, without the end."""
        head, tail = _around(_VERSIONS, encode(self.summary))
        piece = bytearray(head)
        async with aclosing(_versions(self._group, self._usage)) as some:
            async for encoded in some:
                piece += encoded
                if len(piece) >= READ_BYTES:
                    yield bytes(piece)
                    piece.clear()
        yield bytes(piece + tail)


class Listing:
    """The reply to a `ListKeyGroups`."""

    def __init__(
        self, request: messages.ListKeyGroups, groups: Sequence[KeyGroup], reader: Reader, usage: UsageKeeper
    ) -> None:
        """Raises `InvalidRequestError` for a token that is none."""
        self._request = request
        self._groups = groups
        self._reader = reader
        self._usage = usage
        self._start = 0 if request.next_token is None else self._after(request.next_token)
        self.summary: Final = KeyGroupsReply([], request_id=request.request_id)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Its line, without the end."""
        most, size, number, last = self._request.limit, 0, 0, ""
        token: str | None = None
        head, _ = _around(_GROUPS, encode(self.summary))
        piece = bytearray(head)
        async with aclosing(self._shown()) as shown:
            async for group, usage in shown:
                if most is not None and number and (number >= most or size >= LIST_PAGE_BYTES):
                    token = _token(last)
                    break
                start, end = _around(_VERSIONS, encode(_without_versions(group)))
                piece += b"," + start if number else start
                size += len(start) + len(end)
                async with aclosing(_versions(group, usage)) as some:
                    async for encoded in some:
                        piece += encoded
                        size += len(encoded)
                        if len(piece) >= READ_BYTES:
                            yield bytes(piece)
                            piece.clear()
                piece += end
                number, last = number + 1, group.key_id
        _, tail = _around(_GROUPS, encode(KeyGroupsReply([], token, request_id=self._request.request_id)))
        yield bytes(piece + tail)

    async def _shown(self) -> AsyncGenerator[tuple[KeyGroup, UsageKeeper | None], None]:
        """The groups that the reader may see, and whether how they are used."""
        work = 0
        for start in range(self._start, len(self._groups), _PIECE):
            some = self._reader.allowed(_LIST, self._groups[start : start + _PIECE])
            described = {group.key_id for group in self._reader.allowed(_DESCRIBE, some)} if self._request.usage else ()
            for group in some:
                yield group, self._usage if group.key_id in described else None
                work += 1 + len(group.versions) % _PIECE
                if work >= _PIECE:
                    await trio.lowlevel.checkpoint()
                    work = 0
            work += _PIECE // 4  # to ask for two hundred that are not shown takes as long as to show fifty

    def _after(self, token: str) -> int:
        name = _named(token)
        for number, group in enumerate(self._groups):
            if group.key_id == name and self._reader.allowed(_LIST, [group]):
                return number + 1
        raise InvalidRequestError("nextToken: not one of this list")


_STATES: Final = {status: VersionState(status.value) for status in VersionStatus}
_GROUPS: Final = b'"keyGroups":['
_VERSIONS: Final = b'"versions":['


def _around(name: bytes, encoded: bytes) -> tuple[bytes, bytes]:
    """What stands before and behind the place of what is still to come. In no text in it can stand `name`, as it is."""
    head, found, tail = encoded.partition(name)
    return head + found, tail


def _without_versions(group: KeyGroup) -> KeyGroupView:
    return KeyGroupView(group.key_id, group.active.version, [])


async def _versions(group: KeyGroup, usage: UsageKeeper | None) -> AsyncGenerator[bytes, None]:
    """The versions of `group`, with the commas between them. Others have their turn meanwhile."""
    versions = iter(group.versions.values())
    is_first = True
    while some := list(islice(versions, _PIECE)):
        if not is_first:
            await trio.lowlevel.checkpoint()
        shown = [
            VersionView(one.version, _STATES[one.status], one.created_at, None if usage is None else usage.usage_of(one))
            for one in some
        ]
        encoded = encode(shown)[1:-1]
        yield encoded if is_first else b"," + encoded
        is_first = False


def _token(name: str) -> str:
    return urlsafe_b64encode(name.encode("utf-8")).decode("ascii")


def _named(token: str) -> str | None:
    try:
        return urlsafe_b64decode(token.encode("ascii")).decode("utf-8")
    except ValueError:
        return None
