"""One connection: order, bounds and the drain. The clock jumps; no test waits.

Each test is played twice: with nothing to be put on record, and with everything, which goes through the outbox.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kms.server import connection
from kms.server.connection import Connection, ConnectionBounds
from kms.server.outbox import Outbox
from kms.service.pipeline import Later, Rejection
from kms.service.served import Turn


@pytest.fixture(autouse=True)
def any_first_byte(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is answered here is no JSON, but where that is what a test is about."""
    if "first_byte" not in request.node.name:
        monkeypatch.setattr(connection, "_FIRST_BYTES", frozenset(range(256)))


class Echo:
    """Answers each line with itself; `slow:` lines answer when `gate` is set."""

    is_recorded = False

    def __init__(self) -> None:
        self.served: list[bytes] = []
        self.gate = trio.Event()
        self.commits: list[int] = []
        self.instead: bytes | None = None
        self.bug: Exception | None = None
        self.taken = 0

    @property
    def turn(self) -> Turn:
        return [(line, None) for line in self.served[self.taken :]] if self.is_recorded else []

    def take(self) -> Turn:
        turn, self.taken = self.turn, len(self.served)
        return turn

    def serve(self, line: bytes) -> bytes | Later:
        self.served.append(line)
        if line.startswith(b"slow:"):
            return partial(self._later, line)
        return line

    async def _later(self, line: bytes) -> bytes:
        await self.gate.wait()
        return line

    def reject(self, line: bytes) -> bytes | None:
        return None

    def frame_too_large(self, limit: int) -> bytes:
        return b"too large"

    def commit(self) -> bytes | None:
        self.commits.append(len(self.served))
        self.take()
        return self.instead

    def commit_together(self, turns: Sequence[Turn]) -> list[bytes | None]:
        if self.bug is not None:
            raise self.bug
        self.commits.append(len(self.served))
        return [self.instead for _ in turns]


@pytest.fixture(autouse=True, params=[False, True], ids=["unrecorded", "recorded"])
def is_recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(Echo, "is_recorded", request.param)
    return bool(request.param)


BOUNDS = ConnectionBounds(max_frame_bytes=100, idle_timeout=30, write_timeout=10)


@contextmanager
def connected(
    pipeline: Echo, bounds: ConnectionBounds = BOUNDS
) -> Iterator[tuple[Connection, trio.SocketStream, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    theirs.settimeout(0)
    client = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    try:
        yield Connection(ours, pipeline, bounds, Outbox(pipeline.commit_together)), client, ours
    finally:
        theirs.close()
        ours.close()


async def read_to_end(client: trio.SocketStream) -> bytes:
    received = b""
    try:
        async for chunk in client:
            received += chunk
    except trio.BrokenResourceError:
        pass
    return received


async def test_replies_come_in_request_order_even_when_one_waits_for_the_disk(autojump_clock: MockClock) -> None:
    pipeline = Echo()
    with connected(pipeline) as (connection, client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(b"a\nslow:b\nc\n")
            assert await client.receive_some() == b"a\n", "what is ready does not wait for the disk"
            assert pipeline.served == [b"a", b"slow:b"]
            pipeline.gate.set()
            await client.send_eof()
            assert await read_to_end(client) == b"slow:b\nc\n"


async def test_nothing_is_sent_before_it_was_put_on_record(autojump_clock: MockClock) -> None:
    pipeline = Echo()
    with connected(pipeline) as (connection, client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            for lines, replies, commits in (
                (b"a\n", b"a\n", [1]),
                (b"b\nc\n", b"b\nc\n", [1, 3]),
            ):
                await client.send_all(lines)
                assert await client.receive_some() == replies
                assert pipeline.commits == commits
            pipeline.instead = b"not on record\n"
            for lines in (b"d\n", b"e\nf\n", b"slow:g\n", b"x" * 101):
                pipeline.gate.set()
                await client.send_all(lines)
                assert await client.receive_some() == pipeline.instead


async def test_a_reply_that_the_socket_takes_only_in_parts_arrives_whole(autojump_clock: MockClock) -> None:
    line = b"x" * 16_000
    with connected(Echo(), ConnectionBounds(max_frame_bytes=1 << 20)) as (connection, client, ours):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(line + b"\n")
            await wait_all_tasks_blocked()
            await client.send_eof()
            assert await read_to_end(client) == line + b"\n"


async def test_a_request_cut_off_by_the_end_of_the_stream_is_still_served(autojump_clock: MockClock) -> None:
    with connected(Echo()) as (connection, client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(b"a\r\n\n  \nrest")
            await client.send_eof()
            assert await read_to_end(client) == b"a\nrest\n"


async def test_a_line_over_the_limit_is_answered_and_the_connection_closed(autojump_clock: MockClock) -> None:
    with connected(Echo()) as (connection, client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(b"a\n" + b"x" * 101 + b"\nb\n")
            assert await read_to_end(client) == b"a\ntoo large\n"


async def test_a_client_that_goes_on_sending_after_too_large_still_gets_the_reply_and_is_let_go(
    autojump_clock: MockClock,
) -> None:
    with connected(Echo()) as (connection, client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(b"x" * 200)
            assert await read_to_end(client) == b"too large\n"
            await client.send_all(b"y" * 1000)
        assert trio.current_time() > 0, "the connection ended by its own deadline"


async def test_an_idle_client_is_closed_after_the_idle_time(autojump_clock: MockClock) -> None:
    with connected(Echo()) as (connection, client, _):
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            assert await read_to_end(client) == b""
        assert trio.current_time() - start == pytest.approx(31, abs=1), "thirty seconds, and at most a sixteenth more"


async def test_one_byte_a_second_does_not_help(autojump_clock: MockClock) -> None:
    with connected(Echo()) as (connection, client, _):
        start = trio.current_time()

        async def dribble() -> None:
            while True:
                try:
                    await client.send_all(b"x")
                except trio.BrokenResourceError:
                    return
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dribble)
            await connection.serve()
        assert trio.current_time() - start == pytest.approx(31, abs=1.5)


async def test_the_idle_time_starts_anew_with_each_whole_frame(autojump_clock: MockClock) -> None:
    with connected(Echo()) as (connection, client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            for _round in range(3):
                await trio.sleep(29)
                await client.send_all(b"a\n")
                assert await client.receive_some() == b"a\n"
            await client.send_eof()


async def test_a_request_at_work_has_no_deadline(autojump_clock: MockClock) -> None:
    pipeline = Echo()
    with connected(pipeline) as (connection, client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(b"slow:a\n")
            await trio.sleep(1000)
            pipeline.gate.set()
            await client.send_eof()
            assert await read_to_end(client) == b"slow:a\n"


async def test_a_client_that_does_not_read_its_replies_is_cut_off(autojump_clock: MockClock) -> None:
    bounds = ConnectionBounds(max_frame_bytes=1 << 20, idle_timeout=30, write_timeout=10)
    with connected(Echo(), bounds) as (connection, client, sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)

            async def flood() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        await client.send_all((b"x" * 1000 + b"\n") * 100)

            nursery.start_soon(flood)
        assert trio.current_time() - start == pytest.approx(10, abs=0.5)


async def test_a_client_that_reads_slowly_but_reads_is_served(autojump_clock: MockClock) -> None:
    bounds = ConnectionBounds(max_frame_bytes=1 << 20)
    with connected(Echo(), bounds) as (connection, client, sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            line = b"x" * 30_000 + b"\n"

            async def send() -> None:
                for _ in range(3):
                    await client.send_all(line)
                await client.send_eof()

            nursery.start_soon(send)
            received = b""
            while chunk := await client.receive_some(5000):
                received += chunk
                await trio.sleep(0.2)
            assert received == line * 3


async def test_draining_closes_a_connection_that_waits(autojump_clock: MockClock) -> None:
    with connected(Echo()) as (connection, client, _):
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(b"half a fr")
            await trio.sleep(1)
            connection.drain()
            assert await read_to_end(client) == b""
        assert trio.current_time() - start < 2


async def test_draining_lets_the_request_at_work_finish(autojump_clock: MockClock) -> None:
    pipeline = Echo()
    with connected(pipeline) as (connection, client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(b"slow:a\n")
            await trio.sleep(1)
            connection.drain()
            await trio.sleep(1)
            pipeline.gate.set()
            assert await read_to_end(client) == b"slow:a\n"


async def test_a_client_that_vanishes_is_an_end_like_any_other(autojump_clock: MockClock) -> None:
    with connected(Echo()) as (connection, client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(b"a\n" * 1000)
            await client.aclose()


async def test_many_replies_go_out_in_pieces_and_all_arrive(autojump_clock: MockClock) -> None:
    with connected(Echo()) as (connection, client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            sent = b"".join(b"%090d\n" % number for number in range(3000))

            async def send() -> None:
                await client.send_all(sent)
                await client.send_eof()

            nursery.start_soon(send)
            assert await read_to_end(client) == sent


async def test_a_request_that_would_wait_for_the_disk_does_not_begin_when_its_client_has_vanished(
    autojump_clock: MockClock,
) -> None:
    begun: list[bytes] = []

    class Observed(Echo):
        async def _later(self, line: bytes) -> bytes:
            begun.append(line)
            return line

    # What is ready is sent before the disk is waited for, and that fails: nobody takes it any more.
    with connected(Observed()) as (connection, client, _):
        await client.send_all(b"a\nslow:b\n")
        await client.aclose()
        await connection.serve()
    assert begun == []


async def test_a_client_that_takes_no_replies_makes_the_server_hold_the_replies_of_one_turn(
    autojump_clock: MockClock,
) -> None:
    size = 1000
    bounds = ConnectionBounds(max_frame_bytes=1 << 20, idle_timeout=30, write_timeout=10)

    class Long(Echo):
        def serve(self, line: bytes) -> bytes:
            self.served.append(line)
            return bytes(size - 1)

    pipeline = Long()
    with connected(pipeline, bounds) as (connection, client, _):
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(b"x\n" * 20_000)
            await wait_all_tasks_blocked()
            answered = len(pipeline.served) * size
            assert answered < 20_000 * size, "it was not held up at all"
            in_the_socket = 0
            # Straight from the socket, so that the server does not go on meanwhile.
            theirs = socket.socket(fileno=socket.dup(client.socket.fileno()))
            theirs.settimeout(0)
            while True:
                try:
                    in_the_socket += len(theirs.recv(1 << 20))
                except BlockingIOError:
                    break
            theirs.close()
            assert answered - in_the_socket <= 32 * size
            nursery.cancel_scope.cancel()


class Doorkeeper(Echo):
    """Rejects every line but `good`."""

    def serve(self, line: bytes) -> bytes:
        self.served.append(line)
        return line if line == b"good" else Rejection(b"rejected")


async def test_who_shows_no_right_token_does_not_earn_more_time(autojump_clock: MockClock) -> None:
    with connected(Doorkeeper()) as (connection, client, _):
        start = trio.current_time()

        async def knock() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                while True:
                    await client.send_all(b"bad\n")
                    await client.receive_some()
                    await trio.sleep(8)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(knock)
            await connection.serve()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - start == pytest.approx(31, abs=1)


async def test_a_right_token_earns_time_again(autojump_clock: MockClock) -> None:
    with connected(Doorkeeper()) as (connection, client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            for _round in range(4):
                for line in (b"bad\n", b"good\n"):
                    await trio.sleep(14)
                    await client.send_all(line)
                    assert await client.receive_some()
            nursery.cancel_scope.cancel()


async def test_a_connection_is_good_for_a_hundred_wrong_tokens_in_a_row(autojump_clock: MockClock) -> None:
    pipeline = Doorkeeper()
    with connected(pipeline) as (connection, client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve)
            await client.send_all(b"bad\n" * 99 + b"good\n" + b"bad\n" * 500)
            assert (await read_to_end(client)).count(b"\n") == 200
        assert len(pipeline.served) == 200


async def _order_of(greedy_lines: bytes, pipeline: Echo, after: int, *, clients: int = 1) -> list[bytes]:
    """What was served in which order, when greedy clients sent lines, and a modest one its own once `after` were served."""
    modest_ours, modest = socket.socketpair()
    serve = pipeline.serve

    def ordered(line: bytes) -> bytes | Later:
        reply = serve(line)
        if len(pipeline.served) == after:
            modest.sendall(b"modest\n")
        return reply

    bounds = ConnectionBounds(max_frame_bytes=1 << 20, idle_timeout=30, write_timeout=10)
    outbox = Outbox(pipeline.commit_together)
    with contextlib.ExitStack() as sockets:
        pipeline.serve = ordered  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            for sock in (modest_ours, modest):
                sockets.enter_context(sock)
            modest_ours.settimeout(0)
            nursery.start_soon(Connection(modest_ours, pipeline, bounds, outbox).serve)
            for _ in range(clients):
                ours, greedy = socket.socketpair()
                for sock in (ours, greedy):
                    sockets.enter_context(sock)
                    sock.settimeout(0)
                nursery.start_soon(Connection(ours, pipeline, bounds, outbox).serve)
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(greedy))
                nursery.start_soon(stream.send_all, greedy_lines)
            while b"modest" not in pipeline.served:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    return pipeline.served


async def test_a_client_that_pipelines_without_end_holds_another_up_for_two_turns_at_most() -> None:
    served = await _order_of(b"x\n" * 2000, Echo(), after=100)
    assert served.index(b"modest") - 100 <= 64


async def test_who_shows_no_right_token_holds_another_up_for_two_requests_at_most() -> None:
    served = await _order_of(b"bad\n" * 90, Doorkeeper(), after=20)
    assert served.index(b"modest") - 20 <= 2


async def test_large_frames_are_served_one_at_a_time_and_others_between_them() -> None:
    served = await _order_of(b"x" * (1 << 16) + b"\n", Echo(), after=2, clients=20)
    assert served.index(b"modest") - 2 <= 2
