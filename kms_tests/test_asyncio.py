"""The async client under asyncio, and what both loops have in common: connections, cancellation, another loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio

from kms.client.async_ import AsyncKmsClient
from kms.client.blocking import KmsClient
from kms.client.loops import Loop, current
from kms.errors import OutcomeUnknownError, ServerUnreachableError, ThrottledError
from kms.limits import MAX_CLIENT_CONNECTIONS
from kms_tests.test_blocking import THROTTLED, answer
from kms_tests.test_links import Door, in_child, listening, quiet

Run = Callable[[Callable[[], Awaitable[None]]], None]


def on_asyncio(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    asyncio.run(main())


RUNS = [pytest.param(on_asyncio, id="asyncio"), pytest.param(trio.run, id="trio")]
every_loop = pytest.mark.parametrize("run", RUNS)


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, str]]:
    with listening(tmp_path_factory.mktemp("async")) as (door, path):
        yield door, path


async def connected(path: str, **options: Any) -> AsyncKmsClient:
    return await AsyncKmsClient.connect_unix(path, token="token", **{"timeout": 10, **options})


@every_loop
def test_each_operation_answers_with_its_result(run: Run, served: tuple[Door, str]) -> None:
    async def work() -> None:
        async with await connected(served[1]) as client:
            assert await client.health() == "Health None"
            assert await client.encrypt(b"abc", key_id="g", aad=b"x") == b"cba"
            assert await client.encrypt_many([b"ab", b"cd"]) == [b"ba", b"dc"]
            assert [group.key_id for group in await client.list_key_groups()] == ["g"]
            assert len([group async for group in client.iter_key_groups(usage=True)]) == 2
            assert await client.destroy_version("g", 3) == "DestroyVersion 3"

    run(work)
    assert served[0].connected == 1


@every_loop
def test_large_batches_do_not_deadlock(run: Run, served: tuple[Door, str]) -> None:
    plaintexts = [bytes([number]) * 200_000 for number in range(30)]

    async def work() -> None:
        async with await connected(served[1]) as client:
            assert await client.encrypt_many(plaintexts) == plaintexts

    run(work)


def test_tasks_of_asyncio_have_connections_of_their_own(served: tuple[Door, str]) -> None:
    async def work() -> None:
        async with await connected(served[1]) as client:
            mine = [b"%03d" % number for number in range(200)]
            assert await asyncio.gather(*map(client.encrypt, mine)) == [one[::-1] for one in mine]

    on_asyncio(work)
    assert 1 < served[0].connected <= MAX_CLIENT_CONNECTIONS


def test_tasks_of_trio_too(served: tuple[Door, str]) -> None:
    came: dict[bytes, bytes] = {}

    async def work() -> None:
        async with await connected(served[1]) as client, trio.open_nursery() as nursery:

            async def one(plaintext: bytes) -> None:
                came[plaintext] = await client.encrypt(plaintext)

            for number in range(200):
                nursery.start_soon(one, b"%03d" % number)

    trio.run(work)
    assert came == {b"%03d" % number: (b"%03d" % number)[::-1] for number in range(200)}


def test_a_program_of_asyncio_does_not_import_trio(served: tuple[Door, str]) -> None:
    program = """
        import asyncio, sys
        from kms import AsyncKmsClient

        async def main():
            async with await AsyncKmsClient.connect_unix(sys.argv[1], token="token") as client:
                assert await client.encrypt(b"ab") == b"ba"

        asyncio.run(main())
        assert "trio" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(program), served[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_where_no_loop_runs_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        current()


@every_loop
def test_in_another_loop_it_begins_anew(run: Run, served: tuple[Door, str]) -> None:
    door, path = served
    made: list[AsyncKmsClient] = []

    async def make() -> None:
        made.append(await connected(path))
        assert await made[0].encrypt(b"ab") == b"ba"

    async def use() -> None:
        assert await made[0].encrypt(b"cd") == b"dc"

    run(make)
    for number in (2, 3):
        run(use)
        assert door.connected == number
    trio.run(use)
    on_asyncio(use)
    made[0]._links.close()


def test_two_loops_in_two_threads_do_not_end_each_others_calls(served: tuple[Door, str]) -> None:
    made: list[AsyncKmsClient] = []

    async def make() -> None:
        made.append(await connected(served[1]))

    async def use() -> None:
        for number in range(200):
            text = b"%03d" % number
            assert await made[0].encrypt(text) == text[::-1]

    on_asyncio(make)
    with ThreadPoolExecutor(4) as pool:
        for loop in [pool.submit(run, use) for run in (on_asyncio, trio.run, on_asyncio, trio.run)]:
            loop.result(60)
    made[0]._links.close()


@every_loop
def test_in_the_child_of_a_fork_it_begins_anew(run: Run, served: tuple[Door, str]) -> None:
    door, path = served
    made: list[AsyncKmsClient] = []

    async def make() -> None:
        made.append(await connected(path))
        await made[0].health()

    async def use() -> None:
        assert await made[0].encrypt(b"cd") == b"dc"

    run(make)

    def child() -> bool:
        run(use)
        return not made[0]._links._taken

    assert in_child(child) == 0
    assert door.connected == 2
    made[0]._links.close()


def test_what_is_cancelled_ends_its_connection_and_no_other() -> None:
    async def work() -> None:
        async with await connected(path) as client:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.health(), 0.05)
            assert not client._links._idle
            assert not client._links._taken

    with listening_with(quiet) as (_, path):
        on_asyncio(work)


@contextlib.contextmanager
def listening_with(*serve: Any) -> Iterator[tuple[Door, str]]:
    with tempfile.TemporaryDirectory() as directory, listening(Path(directory), *serve) as found:
        yield found


@every_loop
def test_what_was_not_answered_is_asked_again_once_and_a_change_never(run: Run) -> None:
    async def work() -> None:
        async with await connected(path) as client:
            assert await client.encrypt(b"ab") == b"ba"
            assert door.connected == 2
        async with await connected(path) as client:
            with pytest.raises(OutcomeUnknownError, match="look before asking again"):
                await client.rotate_key_group("g")
            assert await client.encrypt(b"ab") == b"ba"

    with listening_with() as (door, path):
        door._serve = [door.takes_one, door.answers, door.takes_one, door.answers]
        run(work)
        assert sum(b"Rotate" in line for line in door.asked) == 1


@every_loop
def test_a_silent_server_times_out(run: Run) -> None:
    async def work() -> None:
        async with await connected(path, timeout=0.05) as client:
            with pytest.raises(ServerUnreachableError, match=r"did not answer for 0\.05 s"):
                await client.health()

    with listening_with(quiet) as (_, path):
        run(work)


@every_loop
def test_what_is_throttled_is_waited_for_up_to_a_bound(run: Run) -> None:
    def throttles(link: Any) -> None:
        with link.makefile("rb") as lines:
            for number, line in enumerate(lines):
                link.sendall(THROTTLED.replace(b"5000", b"1") if number < 3 else answer(line))

    async def work() -> None:
        async with await connected(path) as client:
            assert await client.health() == "Health None"
        async with await connected(path, timeout=0.0005) as client:
            with pytest.raises((ThrottledError, ServerUnreachableError)):
                await client.health()

    with listening_with(throttles) as (_, path):
        run(work)


@every_loop
def test_who_closes_it_ends_the_calls_of_others(run: Run) -> None:
    async def work() -> None:
        client = await connected(path)
        if run is on_asyncio:
            call = asyncio.ensure_future(client.health())
            for _ in range(10):
                await asyncio.sleep(0)
            assert client._links._taken
            await client.aclose()
            with pytest.raises(ServerUnreachableError, match="is closed"):
                await call
        await client.aclose()
        with pytest.raises(ServerUnreachableError, match="is closed"):
            await client.health()

    with listening_with(quiet) as (_, path):
        run(work)


def at_once(run: Run, client: AsyncKmsClient, number: int) -> Callable[[], Awaitable[list[object]]]:
    """So many calls at once; what each came to."""
    came: list[object] = []

    async def one(text: bytes) -> None:
        try:
            came.append(await client.encrypt(text) == text[::-1])
        except ServerUnreachableError as error:
            came.append(str(error))

    async def all_of_them() -> list[object]:
        texts = [b"%03d" % index for index in range(number)]
        if run is on_asyncio:
            await asyncio.gather(*map(one, texts))
        else:
            async with trio.open_nursery() as nursery:
                for text in texts:
                    nursery.start_soon(one, text)
        return came

    return all_of_them


@every_loop
def test_more_calls_than_connections_wait_for_each_other(run: Run, served: tuple[Door, str]) -> None:
    async def work() -> None:
        async with await connected(served[1]) as client:
            client._links._most = 2
            assert await at_once(run, client, 50)() == [True] * 50

    run(work)
    assert served[0].connected == 2


@every_loop
def test_who_waits_for_a_connection_does_not_wait_for_ever(run: Run) -> None:
    async def work() -> None:
        async with await connected(path, timeout=0.05) as client:
            client._links._most = 1
            came = await at_once(run, client, 3)()
        assert any("did not answer" in str(one) for one in came)
        assert all("did not answer" in str(one) or "are in use" in str(one) for one in came)

    with listening_with(quiet) as (_, path):
        run(work)


@every_loop
def test_a_server_that_starts_again_is_waited_for(run: Run, served: tuple[Door, str]) -> None:
    async def work() -> None:
        async with await connected(served[1]) as client:
            await client.health()
            connect, refused = client._connect, 0
            assert connect is not None

            async def starting(loop: Loop, within: float) -> socket.socket:
                nonlocal refused
                refused += 1
                if refused < 4:
                    raise ServerUnreachableError("no server answers")
                return await connect(loop, within)

            client._connect = starting
            client._links.drop_idle()
            assert await client.encrypt(b"ab") == b"ba"
            assert refused == 4
            refused = -(10**9)
            client._timeout = 0.05
            client._links.drop_idle()
            with pytest.raises(ServerUnreachableError, match="no server answers"):
                await client.health()

    run(work)


@every_loop
def test_it_connects_over_tcp(run: Run) -> None:
    door = Door()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                door.take_up(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        port = listener.getsockname()[1]

        async def work() -> None:
            async with await AsyncKmsClient.connect_tcp(port=port, token="token") as client:
                assert await client.encrypt(b"ab") == b"ba"

        run(work)
        thread.join(10)

    async def nobody() -> None:
        with pytest.raises(ServerUnreachableError, match="Connection refused"):
            await AsyncKmsClient.connect_tcp(port=port, token="token")

    run(nobody)


@every_loop
def test_from_env_finds_a_server_over_tcp_too(run: Run, tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "MINIKMS_TCP_PORT": "1", "MINIKMS_API_TOKEN": "t"}

    async def nobody() -> None:
        with pytest.raises(ServerUnreachableError, match=r"127\.0\.0\.1:1"):
            await AsyncKmsClient.from_env(environ=environ)

    run(nobody)
    with pytest.raises(ServerUnreachableError, match=r"127\.0\.0\.1:1"):
        KmsClient.from_env(environ=environ)
