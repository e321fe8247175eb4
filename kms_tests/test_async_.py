"""The trio client against a server that does what each test needs."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from kms.client.async_ import AsyncKmsClient
from kms.client.protocol import DataKey
from kms.errors import (
    AuthFailedError,
    ConfigError,
    DecryptionFailedError,
    FrameTooLargeError,
    OutcomeUnknownError,
    ProtocolError,
    ServerUnreachableError,
    ThrottledError,
)
from kms_tests.test_blocking import THROTTLED, answer, page


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def serve_lines(stream: trio.SocketStream) -> None:
    partial = b""
    async for data in stream:
        *lines, partial = (partial + data).split(b"\n")
        for line in lines:
            await stream.send_all(answer(line))


async def silent(stream: trio.SocketStream) -> None:
    async for _ in stream:
        pass


@asynccontextmanager
async def connected(
    serve: Callable[[trio.SocketStream], Awaitable[None]] = serve_lines,
    *,
    token: str = "token",
    reply_timeout: float = 10.0,
) -> AsyncIterator[AsyncKmsClient]:
    near, far = socket.socketpair()
    far.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(far))

    async def run() -> None:
        async with stream:
            await serve(stream)

    async with AsyncKmsClient(near, "test", token=token, timeout=reply_timeout) as client, trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield client
        nursery.cancel_scope.cancel()


async def test_key_groups_are_asked_for_in_pages_as_they_are_needed() -> None:
    asked: list[bytes | bytearray] = []

    async def serve(stream: trio.SocketStream) -> None:
        async for data in stream:
            asked.append(data)
            await stream.send_all(page(data))

    async with connected(serve) as client:
        async with aclosing(client.iter_key_groups(page_size=2)) as groups:
            seen = [group.key_id async for group in groups]
        assert (seen, len(asked)) == (["a", "b", "c", "d", "e"], 3)
        async with aclosing(client.iter_key_groups(page_size=2)) as groups:
            assert (await anext(groups)).key_id == "a"
        assert len(asked) == 4


async def test_a_throttled_call_is_sent_again_when_the_server_says(autojump_clock: MockClock) -> None:
    asked: list[float] = []

    async def serve(stream: trio.SocketStream) -> None:
        async for data in stream:
            asked.append(trio.current_time())
            await stream.send_all(THROTTLED if len(asked) < 3 else answer(data))

    async with connected(serve) as client:
        began = trio.current_time()
        assert await client.health() == "Health None"
        assert [round(at - began, 1) for at in asked] == [0, 5, 10]


async def test_a_call_that_is_throttled_for_too_long_is_refused_and_the_connection_stays(autojump_clock: MockClock) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async for _ in stream:
            await stream.send_all(THROTTLED)

    async with connected(serve) as client:
        for _ in range(2):
            began = trio.current_time()
            with pytest.raises(ThrottledError, match="too often"):
                await client.health()
            assert trio.current_time() - began <= 10


async def test_who_closes_a_client_that_waits_ends_its_call(autojump_clock: MockClock) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async for _ in stream:
            await stream.send_all(THROTTLED)

    async with connected(serve) as client, trio.open_nursery() as nursery:

        async def close() -> None:
            await trio.sleep(1)
            await client.aclose()

        nursery.start_soon(close)
        with pytest.raises(ServerUnreachableError, match="is closed"):
            await client.health()


async def test_the_outcome_of_a_change_is_unknown_when_its_reply_does_not_come(autojump_clock: MockClock) -> None:
    async def gone(stream: trio.SocketStream) -> None:
        await stream.receive_some()

    for serve in (gone, silent):
        async with connected(serve) as client:
            with pytest.raises(OutcomeUnknownError, match="look before asking again"):
                await client.rotate_key_group("g")
        async with connected(serve) as client:
            with pytest.raises(ServerUnreachableError):
                await client.encrypt(b"x")


async def test_each_operation_answers_with_its_result() -> None:
    async with connected() as client:
        assert await client.health() == "Health None"
        assert await client.generate_data_key("g") == DataKey(b"p", b"w")
        assert await client.encrypt(b"abc", key_id="g", aad=b"x") == b"cba"
        assert await client.decrypt(b"cba") == b"abc"
        assert await client.reencrypt(b"abc", "g") == b"cba"
        assert await client.encrypt_many([b"ab", b"cd"]) == [b"ba", b"dc"]
        assert await client.decrypt_many(iter([b"ab", b"cd"])) == [b"ba", b"dc"]
        assert (await client.create_key_group("g")).key_id == "g"
        assert (await client.rotate_key_group("g")).active_version == 1
        assert [group.key_id for group in await client.list_key_groups()] == ["g"]
        assert len(await client.list_key_groups(usage=True)) == 2
        assert (await client.describe_key_group("g")).key_id == "g"
        assert await client.disable_version("g", 3) == "DisableVersion 3"
        assert await client.disable_version("g", 3, for_seconds=60) == "DisableVersion 3"
        assert await client.enable_version("g", 3) == "EnableVersion 3"
        assert await client.destroy_version("g", 3) == "DestroyVersion 3"
        assert "token" not in repr(client)


async def test_refusals_leave_the_connection_usable() -> None:
    async with connected(token="wrong") as client:
        for _ in range(2):
            with pytest.raises(AuthFailedError):
                await client.health()
    async with connected() as client:
        with pytest.raises(DecryptionFailedError):
            await client.decrypt_many([b"x", b"bad", *([b"y"] * 500)])
        assert await client.decrypt(b"ab") == b"ba"


async def test_many_large_requests_do_not_deadlock_with_a_server_that_answers_before_it_reads_on() -> None:
    plaintexts = [bytes([number]) * 200_000 for number in range(30)]
    async with connected() as client:
        with trio.fail_after(30):
            assert await client.encrypt_many(plaintexts) == plaintexts


async def test_tasks_take_turns_where_there_is_one_connection() -> None:
    results: dict[bytes, bytes] = {}

    async with connected() as client:

        async def one(plaintext: bytes) -> None:
            results[plaintext] = await client.encrypt(plaintext)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, b"%02d" % number)
    assert results == {b"%02d" % number: (b"%02d" % number)[::-1] for number in range(20)}


async def test_a_cancelled_exchange_closes_the_connection() -> None:
    async with connected(silent) as client:
        with trio.move_on_after(0.05) as scope:
            await client.health()
        assert scope.cancelled_caught
        with pytest.raises(ServerUnreachableError, match="is closed"):
            await client.health()


async def test_a_silent_server_times_out() -> None:
    async with connected(silent, reply_timeout=0.05) as client:
        with pytest.raises(ServerUnreachableError, match=r"did not answer for 0\.05 s"):
            await client.health()


async def deaf(_: trio.SocketStream) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("size", [1, 5_000_000])
async def test_closing_fails_a_call_under_way_whether_it_waits_to_send_or_for_its_reply(size: int) -> None:
    async with connected(deaf) as client, trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(ServerUnreachableError, match="is closed"):
                await client.encrypt(bytes(size))

        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await client.aclose()
        await client.aclose()


async def test_frame_too_large_is_raised_and_closes_the_client() -> None:
    async def refuse(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(b'{"status":"error","errorCode":"FrameTooLarge","message":"too large"}\n')

    async with connected(refuse) as client:
        with pytest.raises(FrameTooLargeError):
            await client.encrypt(bytes(5_000_000))
        with pytest.raises(ServerUnreachableError):
            await client.health()


@pytest.mark.parametrize(("said", "error"), [(b"", ServerUnreachableError), (b"hello\n", ProtocolError)])
async def test_a_broken_or_babbling_server_is_told_apart(said: bytes, error: type[Exception]) -> None:
    async def end(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(said)

    async with connected(end) as client:
        with pytest.raises(error):
            await client.health()


async def test_it_connects_over_tcp_and_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        unix.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(unix))
        async with trio.open_nursery() as nursery:
            (tcp,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = tcp.socket.getsockname()[1]
            nursery.start_soon(trio.serve_listeners, serve_lines, [tcp, listener])
            async with await AsyncKmsClient.connect_tcp("127.0.0.1", port, token=b"token") as client:
                assert await client.encrypt(b"ab") == b"ba"
            async with await AsyncKmsClient.connect_unix(path, token="token") as client:
                assert await client.encrypt(b"ab") == b"ba"
            with pytest.raises(ConfigError):
                await AsyncKmsClient.connect_unix(path, token=b"\xff")
            nursery.cancel_scope.cancel()


async def test_no_server_is_unreachable_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ServerUnreachableError, match=r"there is no socket .*; start kms-server, or say where it is"):
        await AsyncKmsClient.connect_unix(tmp_path / "none", token="t")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ServerUnreachableError, match=rf"127\.0\.0\.1:{port}: Connection refused; is kms-server running"):
        await AsyncKmsClient.connect_tcp(port=port, token="t")
