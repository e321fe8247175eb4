"""The outbox: one record for all connections of a round, and whatever may go wrong with it or behind it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kms.limits import READ_BYTES
from kms.server import connection as connections
from kms.server.connection import Connection, ConnectionBounds
from kms.server.outbox import Outbox
from kms.service.served import Turn
from kms_tests.test_connection import Echo, read_to_end

BOUNDS = ConnectionBounds(max_frame_bytes=1 << 20, idle_timeout=30, write_timeout=10)


class Recorded(Echo):
    is_recorded = True


@pytest.fixture(autouse=True)
def any_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is answered here is no JSON."""
    monkeypatch.setattr(connections, "_FIRST_BYTES", frozenset(range(256)))


class Office:
    """Connections with one outbox between them."""

    def __init__(self) -> None:
        self.commits: list[int] = []
        """How many turns each record was of."""
        self.instead: bytes | None = None
        self.bug: Exception | None = None
        self.outbox = Outbox(self.commit)
        self._sockets = contextlib.ExitStack()

    def commit(self, turns: Sequence[Turn]) -> list[bytes | None]:
        if self.bug is not None:
            raise self.bug
        self.commits.append(len(turns))
        return [self.instead for _ in turns]

    def connect(self, session: Echo | None = None) -> tuple[Connection, socket.socket, socket.socket]:
        """A connection, its client's socket and its own."""
        ours, theirs = (self._sockets.enter_context(sock) for sock in socket.socketpair())
        ours.settimeout(0)
        theirs.settimeout(0)
        return Connection(ours, session or Recorded(), BOUNDS, self.outbox), theirs, ours

    def __enter__(self) -> Office:
        return self

    def __exit__(self, *_: object) -> None:
        self._sockets.close()


def stream_of(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def test_all_connections_that_are_answered_in_one_round_share_one_record(autojump_clock: MockClock) -> None:
    with Office() as office:
        async with trio.open_nursery() as nursery:
            clients = []
            for _ in range(5):
                connection, theirs, _ = office.connect()
                clients.append(theirs)
                nursery.start_soon(connection.serve)
            await wait_all_tasks_blocked()
            for number, theirs in enumerate(clients):
                theirs.sendall(b"%d\n" % number)
            await wait_all_tasks_blocked()
            assert [theirs.recv(100) for theirs in clients] == [b"0\n", b"1\n", b"2\n", b"3\n", b"4\n"]
            assert office.commits == [5]
            clients[2].sendall(b"again\n")
            await wait_all_tasks_blocked()
            assert clients[2].recv(100) == b"again\n"
            assert office.commits == [5, 1]
            nursery.cancel_scope.cancel()


async def test_each_is_sent_what_stands_in_for_its_reply(autojump_clock: MockClock) -> None:
    with Office() as office:
        office.instead = b"unavailable\n"
        async with trio.open_nursery() as nursery:
            connection, theirs, _ = office.connect()
            nursery.start_soon(connection.serve)
            theirs.sendall(b"a\n")
            await wait_all_tasks_blocked()
            assert theirs.recv(100) == b"unavailable\n"
            office.instead = None
            theirs.sendall(b"b\n")
            await wait_all_tasks_blocked()
            assert theirs.recv(100) == b"b\n", "and it goes on"
            nursery.cancel_scope.cancel()


LONG = b"x" * (READ_BYTES - 1) + b"\n"
"""As long as one that goes through the outbox can be, and more than a small socket buffer takes."""


async def test_what_the_socket_did_not_take_is_sent_to_a_client_that_is_silent_and_reads(autojump_clock: MockClock) -> None:
    with Office() as office:
        connection, theirs, ours = office.connect()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client = stream_of(theirs)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            for line in (LONG, b"short\n"):
                await client.send_all(line)
                await wait_all_tasks_blocked()
                received = b""
                with trio.fail_after(5):
                    while len(received) < len(line):
                        received += await client.receive_some(5000)
                assert received == line
            nursery.cancel_scope.cancel()


async def test_a_silent_client_that_does_not_read_is_cut_off_after_the_write_time(autojump_clock: MockClock) -> None:
    with Office() as office:
        connection, theirs, ours = office.connect()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await stream_of(theirs).send_all(LONG)
        assert trio.current_time() - start == pytest.approx(BOUNDS.write_timeout, abs=0.5)


async def test_after_a_reply_in_pieces_the_idle_time_begins_anew(autojump_clock: MockClock) -> None:
    with Office() as office:
        connection, theirs, ours = office.connect()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client = stream_of(theirs)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(LONG)
            await trio.sleep(5)
            received = 0
            while received < len(LONG):
                received += len(await client.receive_some(100_000))
            start = trio.current_time()
            assert await read_to_end(client) == b""
        assert trio.current_time() - start == pytest.approx(BOUNDS.idle_timeout, abs=3)


async def test_a_drain_waits_for_what_is_still_to_be_sent(autojump_clock: MockClock) -> None:
    with Office() as office:
        connection, theirs, ours = office.connect()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client = stream_of(theirs)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(LONG)
            await wait_all_tasks_blocked()
            connection.drain()
            assert await read_to_end(client) == LONG


async def test_a_drain_in_the_round_in_which_a_reply_is_sent_in_part_loses_none_of_it(autojump_clock: MockClock) -> None:
    class Late(Office):
        def commit(self, turns: Sequence[Turn]) -> list[bytes | None]:
            connection.drain()
            return super().commit(turns)

    with Late() as office:
        connection, theirs, ours = office.connect()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client = stream_of(theirs)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(LONG)
            await wait_all_tasks_blocked()
            assert await read_to_end(client) == LONG


async def test_a_drain_closes_a_connection_whose_replies_were_sent_in_pieces_before(autojump_clock: MockClock) -> None:
    with Office() as office:
        connection, theirs, ours = office.connect()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client = stream_of(theirs)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(LONG)
            received = 0
            while received < len(LONG):
                received += len(await client.receive_some(100_000))
            await wait_all_tasks_blocked()
            start = trio.current_time()
            connection.drain()
            assert await read_to_end(client) == b""
        assert trio.current_time() - start < 1


async def test_a_drain_between_the_answer_and_its_sending_loses_no_reply(autojump_clock: MockClock) -> None:
    class Draining(Recorded):
        def serve(self, line: bytes) -> bytes:
            trio.lowlevel.spawn_system_task(self.drain)
            return bytes(super().serve(line))  # type: ignore[arg-type]

        async def drain(self) -> None:
            connection.drain()

    class Late(Office):
        def commit(self, turns: Sequence[Turn]) -> list[bytes | None]:
            connection.drain()
            return super().commit(turns)

    for office in (Office(), Late()):
        with office:
            connection, theirs, _ = office.connect(Draining() if type(office) is Office else None)
            start = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.serve)
                theirs.sendall(b"a\n")
            assert trio.current_time() - start < 1, "it ends at once"
            assert theirs.recv(100) == b"a\n"
            assert theirs.recv(100) == b""


async def test_a_client_that_is_gone_by_then_is_an_end_like_any_other(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Gone(Office):
        def commit(self, turns: Sequence[Turn]) -> list[bytes | None]:
            theirs.close()
            return super().commit(turns)

    with Gone() as office:
        connection, theirs, _ = office.connect()
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            theirs.sendall(b"a\n")
        assert trio.current_time() - start < 1
    assert caplog.text == ""


async def test_a_client_that_reads_no_more_but_still_sends_is_let_go(autojump_clock: MockClock) -> None:
    with Office() as office:
        connection, theirs, _ = office.connect()
        theirs.shutdown(socket.SHUT_RD)
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            theirs.sendall(b"a\n")
        assert trio.current_time() - start < 1


async def test_a_bug_in_the_record_costs_the_connections_of_that_round_and_no_others(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    with Office() as office:
        async with trio.open_nursery() as nursery:
            (first, first_client, _), (second, second_client, _) = office.connect(), office.connect()
            nursery.start_soon(first.serve)
            nursery.start_soon(second.serve)
            office.bug = RuntimeError("canary")
            first_client.sendall(b"a\n")
            await wait_all_tasks_blocked()
            assert first_client.recv(100) == b"", "nothing is sent that may not be on record"
            office.bug = None
            second_client.sendall(b"b\n")
            await wait_all_tasks_blocked()
            assert second_client.recv(100) == b"b\n"
            nursery.cancel_scope.cancel()
    assert "RuntimeError" in caplog.text
    assert "canary" not in caplog.text


async def test_a_bug_in_one_delivery_keeps_no_other_from_being_delivered(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(reply: bytes | None) -> None:
        raise RuntimeError("canary")

    with Office() as office:
        delivered: list[bytes | None] = []
        for _ in range(2):
            office.outbox.add(Recorded(), b"a", broken)
            office.outbox.add(Recorded(), b"b", delivered.append)
            await trio.sleep(1)
    assert delivered == [b"b", b"b"]
    assert caplog.text.count("a reply could not be delivered: RuntimeError") == 2


async def test_it_is_not_there_at_all_where_nothing_is_to_be_recorded(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(instrument: trio.abc.Instrument) -> None:
        raise AssertionError

    monkeypatch.setattr(trio.lowlevel, "add_instrument", refuse)
    with Office() as office:
        async with trio.open_nursery() as nursery:
            connection, theirs, _ = office.connect(Echo())
            nursery.start_soon(connection.serve)
            theirs.sendall(b"a\n")
            await wait_all_tasks_blocked()
            assert theirs.recv(100) == b"a\n"
            nursery.cancel_scope.cancel()
