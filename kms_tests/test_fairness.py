"""Who takes nothing from others: which first bytes are served, who makes room, whose turn ends, what a long line costs."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kms.core.policy import KeyAuthorizationPolicy
from kms.limits import READ_BYTES
from kms.server import connection
from kms.server.connection import ConnectionBounds, Session
from kms.server.crowd import Crowd
from kms.server.outbox import Outbox
from kms.service.pipeline import Refusal, Rejection
from kms.service.served import Peer
from kms.wire import messages
from kms_tests.in_memory import API, Server

HEALTH = b'{"type":"Health","token":"%b"}\n' % API.encode()
STRANGER = b'{"type":"Health","token":"wrong"}\n'


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class House:
    """A crowd in front of a server in memory; each client is the other end of a pair of sockets."""

    def __init__(self, nursery: trio.Nursery, most: int = 8, policy: KeyAuthorizationPolicy | None = None) -> None:
        self.server = Server(policy)
        self.pipeline = self.server.pipeline
        self.crowd = Crowd(self.session, ConnectionBounds(), Outbox(self.pipeline.commit), most)
        self._nursery = nursery
        self._held = contextlib.ExitStack()

    def session(self, peer: Peer) -> Session:
        return self.pipeline.session(peer)

    async def connect(self, transport: str = "tcp", say: bytes = b"") -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.settimeout(0)
        theirs.settimeout(0)
        self._held.enter_context(theirs)
        theirs.sendall(say)
        self._nursery.start_soon(self.crowd.serve, ours, transport)
        await wait_all_tasks_blocked()
        return theirs

    def close(self) -> None:
        self._held.close()


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with trio.open_nursery() as nursery:
        house = House(nursery)
        yield house
        nursery.cancel_scope.cancel()
    house.close()


def is_closed(client: socket.socket) -> bool:
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    return True


@pytest.mark.parametrize("first_byte", [b"G", b"P", b"\x16", b"\0", b"[", b'"', b"\xef", b"\xff", b"\x0b", b"\x0c"])
async def test_another_protocol_is_closed_without_a_word(house: House, first_byte: bytes) -> None:
    client = await house.connect(say=first_byte + b"ET / HTTP/1.1\r\n\r\n" + HEALTH)
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(100) == b""
    assert not house.server.seen


@pytest.mark.parametrize("first_byte", [b"", b" ", b"\t", b"\r", b"\n", b" \n\t\r\n"])
async def test_what_may_stand_before_JSON_may_come_first(house: House, first_byte: bytes) -> None:
    client = await house.connect(say=first_byte + HEALTH)
    assert b'"detail":"ok"' in client.recv(1000)


async def test_silent_strangers_make_room_the_one_that_is_idle_longest_first(house: House) -> None:
    silent = [await house.connect() for _ in range(8)]
    assert house.crowd.open["tcp"] == 8
    silent[0].sendall(STRANGER)
    await wait_all_tasks_blocked()
    clients = [await house.connect(say=HEALTH) for _ in range(3)]
    assert [is_closed(one) for one in silent] == [False, True, True, True, False, False, False, False]
    assert all(b'"ok"' in one.recv(1000) for one in clients)
    assert (house.crowd.evicted["tcp"], house.crowd.refused["tcp"]) == (3, 0)


async def test_who_is_known_makes_no_room(house: House) -> None:
    known = [await house.connect(say=HEALTH) for _ in range(8)]
    assert is_closed(await house.connect(say=HEALTH))
    assert house.crowd.refused["tcp"] == 1
    assert not any(is_closed(one) for one in known)


async def test_a_stranger_that_sends_byte_after_byte_is_idle_all_the_same(house: House) -> None:
    dripping = await house.connect(say=b" ")
    others = [await house.connect() for _ in range(7)]
    dripping.sendall(b" ")
    await wait_all_tasks_blocked()
    await house.connect(say=HEALTH)
    assert is_closed(dripping)
    assert not any(is_closed(one) for one in others)


async def test_each_listener_has_a_share_that_the_other_cannot_take(house: House) -> None:
    known = [await house.connect("tcp", HEALTH) for _ in range(8)]
    local = [await house.connect("unix") for _ in range(2)]
    assert not any(is_closed(one) for one in [*known, *local])
    assert is_closed(await house.connect("tcp", HEALTH)), "it does not take the place of who has come in elsewhere"
    assert not any(is_closed(one) for one in local)
    await house.connect("unix", HEALTH)
    assert [is_closed(one) for one in local] == [True, False]
    assert not any(is_closed(one) for one in known)


async def test_strangers_make_room_for_who_comes_in_elsewhere_where_they_have_more_than_their_share(
    house: House,
) -> None:
    strangers = [await house.connect("tcp") for _ in range(20)]
    assert sum(not is_closed(one) for one in strangers) == 8
    local = [await house.connect("unix", HEALTH) for _ in range(8)]
    assert not any(is_closed(one) for one in local)
    assert sum(not is_closed(one) for one in strangers) == 2
    assert house.crowd.open["unix"] + house.crowd.open["tcp"] == 10
    assert is_closed(await house.connect("unix", HEALTH))


class Refusing:
    """Refuses each line; says after how many lines which connection was served."""

    turn: list[tuple[bytes, None]] = []  # noqa: RUF012 - as a session without an audit log

    def __init__(self, order: list[int], number: int, kind: type[bytes]) -> None:
        self._order, self._number, self._kind = order, number, kind

    def serve(self, line: bytes) -> bytes:
        self._order.append(self._number)
        return self._kind(b"no")

    def reject(self, line: bytes) -> bytes | None:
        return None

    def frame_too_large(self, limit: int) -> bytes:
        return b""

    def commit(self) -> bytes | None:
        return None

    def take(self) -> list[tuple[bytes, None]]:
        return []


@pytest.mark.parametrize(("kind", "longest"), [(Refusal, 2), (Rejection, 2), (bytes, 8)])
async def test_a_request_that_is_refused_ends_the_turn(kind: type[bytes], longest: int) -> None:
    order: list[int] = []
    with contextlib.ExitStack() as held:
        async with trio.open_nursery() as nursery:
            for number in range(3):
                ours, theirs = (held.enter_context(one) for one in socket.socketpair())
                ours.settimeout(0)
                theirs.sendall(b"{\n" * 8)
                session = Refusing(order, number, kind)
                nursery.start_soon(
                    connection.Connection(ours, session, ConnectionBounds(), Outbox(lambda turns: [])).serve  # type: ignore[arg-type]
                )
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    runs = [len(list(run)) for run in _runs(order)]
    assert len(order) == 24
    # Two where it is the last in one round of the event loop and the first in the next.
    assert max(runs) <= longest if kind is not bytes else max(runs) == longest


def _runs(order: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for one in order:
        if runs and runs[-1][-1] == one:
            runs[-1].append(one)
        else:
            runs.append([one])
    return runs


async def test_a_long_line_without_a_right_token_is_refused_before_it_is_decoded(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def counted(line: bytes) -> messages.Request:
        decoded.append(len(line))
        return messages.decode_request(line)

    monkeypatch.setattr("kms.service.pipeline.decode_request", counted)
    long = b"A" * (4 * READ_BYTES)
    for shown in (b'"token":"wrong",', b"", b'"token":7,'):
        client = await house.connect(say=b'{"type":"Encrypt",%b"plaintext":"%b"}\n' % (shown, long))
        await wait_all_tasks_blocked()
        assert b"AuthFailed" in client.recv(1000)
    assert decoded == []
    client = await house.connect(say=b'{"type":"Encrypt","token":"%b","plaintext":"%b"}\n' % (API.encode(), long))
    await wait_all_tasks_blocked()
    assert b'"ok"' in client.recv(1 << 20)
    assert len(decoded) == 1
