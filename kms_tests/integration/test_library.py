"""The library with a real server: found through the environment, with files, in threads, in children, across restarts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import trio

from kms import AsyncKmsClient, DecryptionFailedError, KmsClient
from kms_tests.integration.processes import Machine, Server, eventually

LETTER = b"a letter\n" * 100_000


def environ(server: Server) -> dict[str, str]:
    return {**server.machine.environment, "MINIKMS_UNIX_SOCKET": str(server.socket)}


def test_files_go_there_and_back(server: Server) -> None:
    root = server.machine.root
    (root / "letter").write_bytes(LETTER)
    read: list[int] = []
    with KmsClient.from_env(environ=environ(server)) as client:
        client.encrypt_file(str(root / "letter"), root / "letter.mke", aad=bytearray(b"x"), progress=read.append)
        client.decrypt_file(root / "letter.mke", root / "back", aad=memoryview(b"x"), source_key_id="default")
        with pytest.raises(DecryptionFailedError):
            client.decrypt_file(root / "letter.mke", root / "none", aad=b"y")
        with (root / "letter").open("rb") as source, (root / "streamed").open("wb") as target:
            client.encrypt_file(source, target)
        client.decrypt_file(root / "streamed", root / "again")
    assert (root / "back").read_bytes() == (root / "again").read_bytes() == LETTER
    assert not (root / "none").exists()
    assert sum(read) == len(LETTER)


def on_asyncio(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    asyncio.run(main())


@pytest.mark.parametrize("run", [trio.run, on_asyncio])
def test_files_go_there_and_back_in_an_event_loop(server: Server, run: Callable[[Any], None]) -> None:
    root = server.machine.root
    (root / "letter").write_bytes(LETTER)

    async def work() -> None:
        async with await AsyncKmsClient.from_env(environ=environ(server)) as client:
            await client.encrypt_file(root / "letter", root / "letter.mke", aad=b"x")
            await client.decrypt_file(root / "letter.mke", root / "back", aad=b"x")

    run(work)
    assert (root / "back").read_bytes() == LETTER


def test_threads_go_on_while_the_server_is_restarted(machine: Machine) -> None:
    server = machine.start()
    with KmsClient.from_env(environ=environ(server), timeout=60) as client, ThreadPoolExecutor(8) as pool:
        is_over = False
        done = [0] * 8

        def work(number: int) -> None:
            while not is_over:
                text = b"%d/%d" % (number, done[number])
                assert client.decrypt(client.encrypt(text)) == text
                done[number] += 1

        workers = [pool.submit(work, number) for number in range(8)]

        def go_on() -> None:
            before = list(done)
            eventually("each goes on", lambda: all(map(int.__lt__, before, done)) or any(one.done() for one in workers))

        try:
            for _ in range(2):
                go_on()
                assert server.stop() == 0
                server = machine.start()
            go_on()
        finally:
            is_over = True
        for worker in workers:
            worker.result(60)


def test_a_client_is_used_by_its_process_and_by_many_children(server: Server) -> None:
    with KmsClient.from_env(environ=environ(server)) as client:
        sealed = client.encrypt(b"of the parent")
        children = []
        for number in range(8):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    mine = b"of %d" % number
                    same = all(client.decrypt(client.encrypt(mine)) == mine for _ in range(50))
                    status = 0 if same and client.decrypt(sealed) == b"of the parent" else 2
                finally:
                    os._exit(status)
            children.append(child)
        for _ in range(50):
            assert client.decrypt(sealed) == b"of the parent"
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
