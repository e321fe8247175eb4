"""Lists of key groups: in pages, made while they are sent, and never more of them than their reader may see."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from kms.core.keyring import CreateGroup, KeyGroup, Keyring, RotateGroup, apply
from kms.core.policy import AllowAll, Operation, Principal
from kms.errors import UnavailableError
from kms.limits import LIST_PAGE_BYTES, READ_BYTES
from kms.server.connection import ConnectionBounds
from kms.server.crowd import Crowd
from kms.server.outbox import Outbox
from kms.service import listing
from kms.service.served import Peer
from kms.wire.messages import KeyGroupReply, KeyGroupsReply, KeyGroupView, VersionState, VersionView, encode
from kms_tests.in_memory import ADMIN, PEER, Server, answered, mint

LIST = b'{"type":"ListKeyGroups","token":"%b"}\n' % ADMIN.encode()


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class Sees(AllowAll):
    """Allows to list the groups of these names, and to describe those."""

    def __init__(self, listed: Sequence[str], described: Sequence[str] = ()) -> None:
        self.names = {Operation.LIST_KEY_GROUPS: set(listed), Operation.DESCRIBE_KEY_GROUP: set(described)}

    def allows(self, principal: Principal, operation: Operation, group: str | None, aad: bytes) -> bool:
        return group is None or group in self.names[operation]


def server_with(number: int, policy: Sees | None = None, versions: int = 1) -> Server:
    server = Server(policy)
    for index in range(number - 1):
        server.manager.current = apply(server.manager.current, CreateGroup(f"g{index}"), now=5, mint=mint)
    for _ in range(versions - 1):
        server.manager.current = apply(server.manager.current, RotateGroup("default"), now=5, mint=mint)
    return server


def names(reply: dict[str, Any]) -> list[str]:
    return [group["keyId"] for group in reply["keyGroups"]]


def pages(server: Server, **fields: Any) -> list[list[str]]:
    found: list[list[str]] = []
    token: dict[str, str] = {}
    while True:
        reply = server.admin("ListKeyGroups", **fields, **token)
        found.append(names(reply))
        if "nextToken" not in reply:
            return found
        token = {"nextToken": reply["nextToken"]}


@pytest.mark.parametrize("request_id", [None, "mine"])
@pytest.mark.parametrize("number", [1, 2, 450])
async def test_a_list_in_pieces_is_the_line_that_it_always_was(number: int, request_id: str | None) -> None:
    server = server_with(number)
    line = {"type": "ListKeyGroups", "token": ADMIN} | ({} if request_id is None else {"requestId": request_id})
    made = await answered(server.pipeline.session(PEER).serve(json.dumps(line).encode()))
    views = [
        KeyGroupView(group.key_id, 1, [VersionView(1, VersionState.ACTIVE, group.created_at)])
        for group in server.manager.list_groups()
    ]
    assert made == encode(KeyGroupsReply(views, request_id=request_id))


@pytest.mark.parametrize("name", ["plain", '"versions":[', '"keyGroups":[]', "[]", "\\", "\N{GRINNING FACE}"])
@pytest.mark.parametrize("versions", [1, 2, 200, 201, 1000])
async def test_a_description_in_pieces_is_the_line_that_it_always_was(name: str, versions: int) -> None:
    server = Server()
    made = server.manager.current.groups["default"].versions[1]
    several = {number: replace(made, version=number) for number in range(1, versions + 1)}
    group = replace(server.manager.current.groups["default"], key_id=name, active=several[versions], versions=several)
    server.manager.current = Keyring(1, {name: group})
    views = [VersionView(one.version, VersionState.ACTIVE, 1) for one in several.values()]
    used = [VersionView(one.version, VersionState.ACTIVE, 1, server.usage.of(one)) for one in several.values()]

    async def asked(kind: str, **fields: Any) -> bytes:
        line = {"type": kind, "token": ADMIN, "requestId": name, **fields}
        return await answered(server.pipeline.session(PEER).serve(json.dumps(line).encode()))

    described = KeyGroupReply(KeyGroupView(name, versions, used), request_id=name)
    assert await asked("DescribeKeyGroup", keyId=name) == encode(described)
    for fields, shown in (({}, views), ({"usage": True}, used)):
        listed = KeyGroupsReply([KeyGroupView(name, versions, shown)], request_id=name)
        assert await asked("ListKeyGroups", **fields) == encode(listed)


def test_who_may_see_no_group_gets_an_empty_list() -> None:
    server = server_with(3, Sees([]))
    assert server.admin("ListKeyGroups") == {"status": "ok", "keyGroups": []}
    assert server.admin("ListKeyGroups", limit=1) == {"status": "ok", "keyGroups": []}


ALL = ["default", *(f"g{index}" for index in range(30))]


@given(st.lists(st.sampled_from(ALL), unique=True), st.integers(1, 40), st.booleans())
def test_pages_are_the_list_cut_into_pieces_whatever_their_reader_may_see(seen: list[str], limit: int, usage: bool) -> None:
    server = server_with(len(ALL), Sees(seen, seen[::2]))
    visible = [name for name in ALL if name in seen]
    found = pages(server, limit=limit, usage=usage)
    assert list(itertools.chain(*found)) == visible
    assert all(len(page) == limit for page in found[:-1])
    assert len(found) == max(1, -(-len(visible) // limit)), "a token is only given where there is more to see"


@pytest.mark.parametrize("token", ["", "!", "\u00e9", "ZGVmYXVsdA", urlsafe_b64encode(b"\xff").decode(), "A" * 5000])
def test_a_token_that_no_list_gave_is_refused(token: str) -> None:
    reply = server_with(3).admin("ListKeyGroups", limit=1, nextToken=token)
    assert (reply["errorCode"], reply["message"]) == ("InvalidRequest", "nextToken: not one of this list")


def test_the_name_of_a_group_that_one_may_not_see_is_a_token_like_that_of_none() -> None:
    server = server_with(5, Sees(["default", "g3"]))
    hidden, unknown = (
        server.admin("ListKeyGroups", limit=1, nextToken=urlsafe_b64encode(name).decode()) for name in (b"g1", b"none")
    )
    assert hidden == unknown
    assert hidden["errorCode"] == "InvalidRequest"


@pytest.mark.parametrize("limit", [0, -1, 1001, "5", True, 1.5])
def test_a_page_has_one_to_a_thousand_groups(limit: object) -> None:
    reply = server_with(1).admin("ListKeyGroups", limit=limit)
    assert reply["errorCode"] == "InvalidRequest"
    assert reply["message"].startswith("limit: ")


def test_a_group_made_between_two_pages_is_on_a_later_one() -> None:
    server = server_with(3)
    first = server.admin("ListKeyGroups", limit=2)
    server.admin("CreateKeyGroup", keyId="late")
    assert names(server.admin("ListKeyGroups", limit=5, nextToken=first["nextToken"])) == ["g1", "late"]


def test_a_page_ends_with_the_group_that_takes_it_past_a_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "LIST_PAGE_BYTES", 400)
    assert LIST_PAGE_BYTES == 1 << 20
    server = server_with(12, versions=9)
    found = pages(server, limit=1000)
    assert found[0] == ["default"], "alone it is larger than a page"
    assert list(itertools.chain(*found)) == ["default", *(f"g{index}" for index in range(11))]
    assert [len(page) for page in found[1:]] == [5, 5, 1]


async def test_a_list_lets_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    groups: list[KeyGroup] = [server.manager.current.groups["default"]] * 5000
    monkeypatch.setattr(server.manager, "list_groups", lambda: groups)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await answered(server.pipeline.session(Peer(1, "unix")).serve(LIST))
        nursery.cancel_scope.cancel()
    assert turns >= 20


class Conversation:
    """One connection to a server in memory, whose other end reads as slowly as it likes."""

    def __init__(self, server: Server, nursery: trio.Nursery, bounds: ConnectionBounds | None = None) -> None:
        ours, self.client = socket.socketpair()
        for end in (ours, self.client):
            end.settimeout(0)
        crowd = Crowd(server.pipeline.session, bounds or ConnectionBounds(), Outbox(server.pipeline.commit), 8)
        nursery.start_soon(crowd.serve, ours, "unix")

    def read(self, most: int = 1 << 16) -> bytes | None:
        """What is there; None when there is nothing, empty at the end."""
        try:
            return self.client.recv(most)
        except BlockingIOError:
            return None

    async def lines(self, number: int) -> list[bytes]:
        data = b""
        while data.count(b"\n") < number:
            await wait_all_tasks_blocked()
            piece = self.read()
            if piece is None:
                continue
            if not piece:
                break
            data += piece
        return data.splitlines()


@contextlib.asynccontextmanager
async def conversation(server: Server, bounds: ConnectionBounds | None = None) -> Any:
    async with trio.open_nursery() as nursery:
        talk = Conversation(server, nursery, bounds)
        with talk.client:
            yield talk
        nursery.cancel_scope.cancel()


def counting(server: Server, monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """A server of many groups, and how often it was asked which of them are allowed."""
    groups = [server.manager.current.groups["default"]] * number
    monkeypatch.setattr(server.manager, "list_groups", lambda: groups)
    asked: list[int] = []

    class Counting(AllowAll):
        def allows(self, principal: Principal, operation: Operation, group: str | None, aad: bytes) -> bool:
            asked.append(1)
            return True

    server.pipeline.admit(server.pipeline.authenticator, Counting())
    return asked


async def test_what_nobody_reads_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    asked = counting(server, monkeypatch, 100_000)
    async with conversation(server) as talk:
        talk.client.send(LIST)
        await wait_all_tasks_blocked()
        assert 0 < len(asked) < 20_000, "what the socket takes, and a piece"
        (line,) = await talk.lines(1)
        assert len(json.loads(line)["keyGroups"]) == 100_000


async def test_replies_around_a_list_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    counting(server, monkeypatch, 3000)
    describe = b'{"type":"DescribeKeyGroup","keyId":"default","token":"%b"}\n' % ADMIN.encode()
    async with conversation(server) as talk:
        talk.client.send(describe + LIST + describe + LIST + LIST + describe)
        replies = [json.loads(line) for line in await talk.lines(6)]
    assert [next(name for name in reply if name != "status") for reply in replies] == [
        *("keyGroup", "keyGroups", "keyGroup", "keyGroups", "keyGroups", "keyGroup")
    ]
    assert {len(reply["keyGroups"]) for reply in replies if "keyGroups" in reply} == {3000}


async def test_who_takes_a_list_too_slowly_in_all_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    server = Server()
    counting(server, monkeypatch, 100_000)
    began = trio.current_time()
    async with conversation(server, ConnectionBounds(write_timeout=10)) as talk:
        talk.client.send(LIST)
        for _ in range(100):
            if talk.read(8 * READ_BYTES) == b"":
                break
            await trio.sleep(1)
        assert trio.current_time() - began < 60, "each piece does not have ten seconds of its own"


class Trail:
    """An audit log that cannot be written."""

    def check(self) -> None:
        pass

    def write(self, turns: object) -> None:
        raise UnavailableError("no space left")


async def test_a_list_that_cannot_be_put_on_record_is_not_shown() -> None:
    server = server_with(3)
    server.pipeline.admit(server.pipeline.authenticator, server.pipeline.policy, Trail())  # type: ignore[arg-type]
    async with conversation(server) as talk:
        talk.client.send(LIST + LIST)
        replies = [json.loads(line) for line in await talk.lines(2)]
    assert [reply["errorCode"] for reply in replies] == ["Unavailable"] * 2


async def test_a_bug_in_the_middle_of_a_list_ends_the_connection_and_not_the_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    asked = counting(server, monkeypatch, 50_000)

    def shown(*_: object) -> VersionView:
        if len(asked) > 30_000:
            raise LookupError("a bug")
        return VersionView(1, VersionState.ACTIVE, 5)

    monkeypatch.setattr("kms.service.listing.VersionView", shown)
    async with conversation(server) as talk:
        talk.client.send(LIST)
        data = b""
        while (piece := talk.read()) != b"":
            data += piece or b""
            await wait_all_tasks_blocked()
    assert data.startswith(b'{"status":"ok","keyGroups":[')
    assert b"\n" not in data
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(data)
    assert "unexpected error in a long reply" in caplog.text
