"""A client of many threads: its connections are nobody else's, replaced when they end, and not shared across a fork."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kms.client import links as links_module
from kms.client.blocking import KmsClient
from kms.client.links import Links
from kms.errors import OutcomeUnknownError, ServerUnreachableError, UnknownServerError
from kms_tests.test_blocking import answer

Serve = Callable[[socket.socket], None]


class Door:
    """Servers in threads, one for each connection; `serve` is what the next one does, the last of them for ever."""

    def __init__(self, *serve: Serve) -> None:
        self._serve = list(serve) or [self.answers]
        self.connected = 0
        self.asked: list[bytes] = []
        self.refuses = 0
        self._held: list[socket.socket] = []

    def connect(self, within: float) -> socket.socket:
        if self.refuses:
            self.refuses -= 1
            raise ServerUnreachableError("no server answers; is kms-server running?")
        near, far = socket.socketpair()
        threading.Thread(target=self.take_up, args=(far,), daemon=True).start()
        return near

    def take_up(self, link: socket.socket) -> None:
        serve = self._serve.pop(0) if len(self._serve) > 1 else self._serve[0]
        self.connected += 1
        with link, contextlib.suppress(OSError):
            serve(link)

    def answers(self, link: socket.socket) -> None:
        with link.makefile("rb") as lines:
            for line in lines:
                self.asked.append(line)
                link.sendall(answer(line))

    def answers_then_ends(self, number: int) -> Serve:
        """Answers so many requests, and ends the connection."""

        def serve(link: socket.socket) -> None:
            with link.makefile("rb") as lines:
                for _ in range(number):
                    line = lines.readline()
                    self.asked.append(line)
                    link.sendall(answer(line))

        return serve

    def takes_one(self, link: socket.socket) -> None:
        """Ends the connection once it has a request."""
        self.asked.append(link.recv(100_000))

    def client(self, timeout: float = 10.0) -> KmsClient:
        return KmsClient(self.connect(timeout), "test", token="token", timeout=timeout, connect=self.connect)


def ended(client: KmsClient) -> None:
    """Return once the connection that `client` keeps has ended."""
    ((link, _),) = client._links._idle
    while True:
        try:
            if link.recv(1, socket.MSG_PEEK) == b"":
                return
        except BlockingIOError:
            time.sleep(0.001)


def test_threads_share_a_client_and_each_gets_its_own_answers() -> None:
    door = Door()
    with door.client() as client, ThreadPoolExecutor(20) as pool:

        def work(number: int) -> bool:
            mine = [b"%d/%d" % (number, step) for step in range(50)]
            return [client.encrypt(one) for one in mine] == [one[::-1] for one in mine]

        assert all(pool.map(work, range(60)))
    assert door.connected <= 21


def test_one_thread_uses_one_connection() -> None:
    door = Door()
    with door.client() as client:
        for _ in range(10):
            client.health()
    assert door.connected == 1


def test_a_connection_that_ended_while_nobody_used_it_is_replaced_also_for_a_change() -> None:
    door = Door()
    door = Door(*(door.answers_then_ends(1) for _ in range(3)), door.answers)
    with door.client() as client:
        assert client.encrypt(b"ab") == b"ba"
        for ask in (client.health, lambda: client.rotate_key_group("g"), lambda: client.create_key_group("h")):
            ended(client)
            ask()
    assert door.connected == 4


def test_what_was_not_answered_is_asked_again_once_on_a_new_connection() -> None:
    door = Door()
    door = Door(door.takes_one, door.answers)
    with door.client() as client:
        assert client.encrypt(b"ab") == b"ba"
    assert door.connected == 2
    door = Door()
    door = Door(door.takes_one, door.takes_one, door.answers)
    with door.client() as client:
        with pytest.raises(ServerUnreachableError, match="broke"):
            client.encrypt(b"ab")
        assert client.encrypt(b"ab") == b"ba"


def test_a_change_of_keys_is_never_asked_twice() -> None:
    door = Door()
    taker = door.takes_one
    door._serve = [taker, door.answers]
    with door.client() as client:
        with pytest.raises(OutcomeUnknownError, match="look before asking again"):
            client.rotate_key_group("g")
        assert sum(b"Rotate" in line for line in door.asked) == 1
        client.health()


def test_of_many_only_those_without_an_answer_are_asked_again() -> None:
    door = Door()
    door._serve = [door.answers_then_ends(10), door.answers]
    plaintexts = [b"%03d" % number for number in range(200)]
    with door.client() as client:
        assert client.encrypt_many(plaintexts) == [one[::-1] for one in plaintexts]
    assert len(door.asked) == 200
    assert door.connected == 2


def test_an_iterable_may_use_the_client_that_iterates_it() -> None:
    door = Door()
    with door.client() as client:
        assert client.encrypt_many(client.encrypt(b"ab") for _ in range(3)) == [b"ab"] * 3
    assert door.connected == 2


def test_one_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door()
    with door.client() as client:
        client.health()
        monkeypatch.setattr(links_module, "IDLE_SECONDS", 0.0)
        monkeypatch.setattr(links_module, "_MOMENT", 0.0)
        client.health()
    assert door.connected == 2


def test_one_that_spoke_while_nobody_asked_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "_MOMENT", 0.0)

    def speaks(link: socket.socket) -> None:
        with link.makefile("rb") as lines:
            for line in lines:
                link.sendall(answer(line))
                time.sleep(0.01)
                link.sendall(b'{"status":"ok","detail":"another\'s"}\n')

    door = Door()
    door._serve = [speaks, door.answers]
    with door.client() as client:
        client.health()
        ((link, _),) = client._links._idle
        while True:
            try:
                if link.recv(1, socket.MSG_PEEK):
                    break
            except BlockingIOError:
                time.sleep(0.001)
        assert client.health() == "Health None"
    assert door.connected == 2


def test_a_server_that_speaks_first_is_none() -> None:
    def speaks(link: socket.socket) -> None:
        link.sendall(b"220 smtp\r\n")
        quiet(link)

    door = Door(speaks)
    client = door.client()
    link = client._links._new
    assert link is not None
    while True:
        try:
            if link.recv(1, socket.MSG_PEEK):
                break
        except BlockingIOError:
            time.sleep(0.001)
    with client, pytest.raises(UnknownServerError, match="before it was asked"):
        client.health()


def test_a_server_that_drips_does_not_hold_a_call_longer_than_its_time() -> None:
    def drips(link: socket.socket) -> None:
        link.recv(1000)
        while True:
            link.sendall(b" ")
            time.sleep(0.01)

    with Door(drips).client(timeout=0.2) as client:
        began = time.monotonic()
        with pytest.raises(ServerUnreachableError, match=r"did not answer for 0\.2 s"):
            client.health()
        assert time.monotonic() - began < 5


def test_a_server_that_starts_again_is_waited_for_and_one_that_was_never_there_is_not() -> None:
    door = Door()
    door._serve = [door.answers_then_ends(1), door.answers]
    with door.client() as client:
        client.health()
        ended(client)
        door.refuses = 3
        assert client.health() == "Health None"
    door.refuses = 1
    with pytest.raises(ServerUnreachableError):
        door.client()


def test_it_is_not_waited_for_longer_than_the_call_may_take() -> None:
    door = Door()
    door._serve = [door.answers_then_ends(1), door.answers]
    with door.client(timeout=0.1) as client:
        client.health()
        ended(client)
        door.refuses = 10_000
        with pytest.raises(ServerUnreachableError, match="no server answers"):
            client.health()


def quiet(link: socket.socket) -> None:
    while link.recv(1000):
        pass


def test_who_closes_a_client_ends_the_calls_of_others() -> None:
    with ThreadPoolExecutor(1) as pool:
        door = Door(quiet)
        client = door.client()
        called = pool.submit(client.health)
        while not client._links._taken:
            time.sleep(0.001)
        client.close()
        with pytest.raises(ServerUnreachableError):
            called.result(10)
        with pytest.raises(ServerUnreachableError, match="is closed"):
            client.health()


def test_more_calls_than_connections_wait_for_each_other_and_not_for_ever() -> None:
    door = Door(quiet)
    links = Links("test", door.connect, door.connect(1), timeout=1, most=2)
    first, second = links.take(time.monotonic() + 1), links.take(time.monotonic() + 1)
    with pytest.raises(ServerUnreachableError, match="all 2 connections to test are in use"):
        links.take(time.monotonic() + 0.02)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(links.take, time.monotonic() + 60)
        links.give_back(first)
        assert waiting.result(60) is first
    links.drop(second)
    third = links.take(time.monotonic() + 1)
    assert third is not second
    links.close()
    for link in (first, third):
        links.drop(link)


def in_child(work: Callable[[], bool]) -> int:
    """The exit status of a forked child that does `work`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def listening(directory: Path, *serve: Serve) -> Iterator[tuple[Door, str]]:
    """A server on a Unix socket, which a child can connect to as well."""
    door, path = Door(*serve), str(directory / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(256)

        def accept() -> None:
            while True:
                try:
                    link, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=door.take_up, args=(link,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield door, path


@pytest.fixture
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, str]]:
    with listening(tmp_path_factory.mktemp("fork")) as served:
        yield served


def test_after_a_fork_parent_and_child_have_connections_of_their_own(forking: tuple[Door, str]) -> None:
    door, path = forking
    with KmsClient.connect_unix(path, token="token", timeout=10) as client:
        assert client.encrypt(b"ab") == b"ba"
        assert in_child(lambda: client.encrypt(b"child") == b"dlihc" and not client._links._taken) == 0
        assert client.encrypt(b"parent") == b"tnerap"
        assert door.connected == 2, "the parent still has the one that it had"


def test_a_child_works_though_a_thread_of_its_parent_held_the_lock_and_a_connection(forking: tuple[Door, str]) -> None:
    _, path = forking
    with KmsClient.connect_unix(path, token="token", timeout=10) as client:
        links = client._links
        taken = links.take(time.monotonic() + 1)
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with links._lock:
                held.set()
                done.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        try:
            descriptor = taken.fileno()
            assert in_child(lambda: client.encrypt(b"ab") == b"ba" and taken.fileno() == -1) == 0
            assert taken.fileno() == descriptor
        finally:
            done.set()
            thread.join()
        links.give_back(taken)
        assert client.encrypt(b"ab") == b"ba"


def test_a_fork_that_ran_no_hooks_is_noticed(forking: tuple[Door, str], monkeypatch: pytest.MonkeyPatch) -> None:
    door, path = forking
    with KmsClient.connect_unix(path, token="token", timeout=10) as client:
        client.health()
        monkeypatch.setattr(client._links, "_process", -1)
        client.health()
        assert door.connected == 2


def test_a_server_sees_a_connection_end_though_a_child_inherited_it(forking: tuple[Door, str]) -> None:
    _, path = forking
    client = KmsClient.connect_unix(path, token="token", timeout=10)
    client.health()
    ((link, _),) = client._links._idle
    number = link.fileno()

    def is_closed_here() -> bool:
        try:
            os.fstat(number)
        except OSError:
            return True
        return False

    assert in_child(is_closed_here) == 0
    client.close()
