"""Key groups as people see them, and the list of them, which is made while it is sent.

A list may be of a hundred thousand groups, and as many may ask for it as there are connections: made whole, thirty of them
took gigabytes, and each stopped all others for a second. So it is made in pieces, each when the one before it is sent, and
others have their turn between them. It is of the groups that there were when it was asked for, and shows those that its
reader may see when their piece is made.

A page is a list with a bound: of groups, and of bytes, as one group may have thousands of versions. Where there is more to
see, it ends with a token: the name of its last group, for whoever asks for the next page. A name that its reader may not
see is no token, or it would tell whether there is such a group.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final, Protocol

import trio

from kms.core.keyring import KeyGroup
from kms.core.policy import Operation
from kms.core.provider import UsageKeeper
from kms.errors import InvalidRequestError
from kms.limits import LIST_PAGE_BYTES, READ_BYTES
from kms.wire import messages

_PIECE: Final = 200
"""Groups and versions that are put into a reply before others have their turn: some 0.2 ms."""

_LIST = Operation.LIST_KEY_GROUPS
_DESCRIBE = Operation.DESCRIBE_KEY_GROUP


class Reader(Protocol):
    """Who asks for a list."""

    def allowed(self, operation: Operation, groups: Sequence[KeyGroup]) -> list[KeyGroup]:
        """Those of `groups` on which the principal may use `operation`."""
        ...


async def view(group: KeyGroup, usage: UsageKeeper | None = None) -> messages.KeyGroupView:
    """`group` for a reply; with `usage` also how its versions are used. Others have their turn meanwhile."""
    versions: list[messages.VersionView] = []
    for number, version in enumerate(group.versions.values(), 1):
        used = None if usage is None else usage.usage_of(version)
        versions.append(messages.VersionView(version.version, version.status.value, version.created_at, used))
        if number % _PIECE == 0:
            await trio.lowlevel.checkpoint()
    return messages.KeyGroupView(group.key_id, group.active.version, versions)


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

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The line of the reply, without its end."""
        piece = bytearray(messages.LIST_START)
        most, size, number, last = self._request.limit, 0, 0, ""
        token: str | None = None
        async with aclosing(self._encoded()) as groups:
            async for group, encoded in groups:
                if most is not None and number and (number >= most or size + len(encoded) > LIST_PAGE_BYTES):
                    token = _token(last)
                    break
                if number:
                    piece += b","
                piece += encoded
                size += len(encoded)
                number, last = number + 1, group.key_id
                if len(piece) >= READ_BYTES:
                    yield bytes(piece)
                    piece.clear()
        piece += messages.list_end(token, self._request.request_id)
        yield bytes(piece)

    async def _encoded(self) -> AsyncGenerator[tuple[KeyGroup, bytes], None]:
        work = 0
        for start in range(self._start, len(self._groups), _PIECE):
            some = self._reader.allowed(_LIST, self._groups[start : start + _PIECE])
            described = {group.key_id for group in self._reader.allowed(_DESCRIBE, some)} if self._request.usage else ()
            for group in some:
                yield group, messages.encode(await view(group, self._usage if group.key_id in described else None))
                work += 1 + len(group.versions)
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


def _token(name: str) -> str:
    return urlsafe_b64encode(name.encode("utf-8")).decode("ascii")


def _named(token: str) -> str | None:
    try:
        return urlsafe_b64decode(token.encode("ascii")).decode("utf-8")
    except ValueError:
        return None
