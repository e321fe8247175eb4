"""The daemon as a whole, run in this process's main thread with a client beside it."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trio._socket import _SocketType

from kms.core.derive import KdfParameters
from kms.core.secret import Secret
from kms.errors import (
    EXIT_INTERNAL,
    EXIT_OK,
    ConfigError,
    InputMissingError,
    KeystoreLockedError,
    WrongPassphraseError,
)
from kms.host import durable, hardening
from kms.server import daemon
from kms.server.config import ServerConfig, resolve
from kms.storage.lock import KeystoreLock
from kms_tests.integration.processes import eventually

TINY = KdfParameters(memory_kib=8, iterations=1, parallelism=1)


class Server:
    """Runs a daemon and, once it is ready, `client` in a thread; then stops it by a signal."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.said: list[str] = []
        self.secrets: list[Secret] = []
        self.failure: BaseException | None = None

    def config(self, **flags: Any) -> ServerConfig:
        paths = {"keystore": self.directory / "keystore.json", "unix_socket": self.directory / "kms.sock"}
        return resolve({"tcp_port": 0, **paths, **flags}, {"XDG_DATA_HOME": str(self.directory)})

    def run(
        self,
        client: Callable[[], None] = lambda: None,
        *,
        stop: int | None = signal.SIGTERM,
        word: bytes = b"pw",
        **flags: Any,
    ) -> int:
        def beside() -> None:
            try:
                client()
            except BaseException as error:  # it belongs to the test, not to this thread
                self.failure = error
            if stop is not None:
                os.kill(os.getpid(), stop)

        thread = threading.Thread(target=beside)

        def say(line: str) -> None:
            self.said.append(line)
            if line.startswith("ready"):
                thread.start()

        self.secrets = [Secret(bytearray(value)) for value in (word, b"api", b"admin")]
        status = daemon.run(self.config(**flags), *self.secrets, say=say, makes_with=TINY)
        thread.join()
        if self.failure is not None:
            raise self.failure
        return status

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(str(self.directory / "kms.sock"))
        return sock

    def ask(self, kind: str, token: str = "api", **fields: Any) -> dict[str, Any]:
        with self.connect() as sock, sock.makefile("rb") as replies:
            sock.sendall(json.dumps({"type": kind, "token": token, **fields}).encode() + b"\n")
            reply: dict[str, Any] = json.loads(replies.readline())
            return reply


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(hardening, "lock_memory", lambda: True)  # not for the whole test run
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    tmp_path.chmod(0o700)
    return Server(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal_and_leaves_nothing_behind(server: Server, number: int) -> None:
    def client() -> None:
        assert server.ask("Health") == {"status": "ok", "detail": "ok"}
        assert server.ask("RotateKeyGroup", "admin", keyId="default")["status"] == "ok"

    assert server.run(client, stop=number) == EXIT_OK
    assert sorted(path.name for path in server.directory.iterdir()) == [
        "keystore.json",
        "keystore.json.lock",
        "keystore.json.usage",
        "kms.sock.lock",
    ]
    assert all(not any(secret.view()) for secret in server.secrets), "passphrase and tokens are wiped"


def test_the_first_run_makes_default_and_later_runs_find_what_was_made(server: Server) -> None:
    sealed: list[str] = []

    def first() -> None:
        assert [g["keyId"] for g in server.ask("ListKeyGroups", "admin")["keyGroups"]] == ["default"]
        sealed.append(server.ask("Encrypt", plaintext="aGk=")["ciphertext"])

    server.run(first)
    assert any("new keystore" in line for line in server.said)
    server.run(lambda: sealed.append(server.ask("Decrypt", ciphertext=sealed[0])["plaintext"]))
    assert sealed[1] == "aGk="


def test_a_wrong_passphrase_stops_the_start_and_touches_nothing(server: Server) -> None:
    server.run()
    before = (server.directory / "keystore.json").read_bytes()
    with pytest.raises(WrongPassphraseError):
        server.run(word=b"wrong")
    assert (server.directory / "keystore.json").read_bytes() == before


def test_a_keystore_held_by_another_is_refused(server: Server) -> None:
    with KeystoreLock(server.directory / "keystore.json"), pytest.raises(KeystoreLockedError, match=str(os.getpid())):
        server.run()


def test_a_save_of_unknown_outcome_stops_it_with_70(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def client() -> None:
        def fail(path: Path) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(durable, "fsync_directory", fail)
        with server.connect() as sock:
            sock.sendall(b'{"type":"RotateKeyGroup","token":"admin","keyId":"default"}\n')
            assert b'"ok"' not in sock.recv(1000)

    assert server.run(client, stop=None) == EXIT_INTERNAL


def test_one_connection_over_the_cap_is_closed_at_once(server: Server) -> None:
    def client() -> None:
        with server.connect() as first, server.connect() as second:
            for sock in (first, second):
                sock.sendall(b'{"type":"Ping","token":"api"}\n')
                assert b"ok" in sock.recv(100)
            with server.connect() as third:
                assert third.recv(100) == b""
        assert server.ask("Health")["status"] == "ok", "a place that is free again is given again"

    server.run(client, max_connections=2)


def test_a_connection_that_waits_does_not_hold_up_the_end(server: Server) -> None:
    held: list[socket.socket] = []

    def client() -> None:
        held.append(server.connect())
        held[0].sendall(b'{"type":"Ping","token":"api"}\n{"half')
        assert b"ok" in held[0].recv(100)

    assert server.run(client) == EXIT_OK
    assert held[0].recv(100) == b""
    held[0].close()


def test_only_TCP(server: Server) -> None:
    assert server.run(no_unix=True) == EXIT_OK
    assert "127.0.0.1:" in server.said[-2]


def test_only_Unix(server: Server) -> None:
    assert server.run(no_tcp=True) == EXIT_OK
    assert "127.0.0.1:" not in server.said[-2]


def test_it_says_when_memory_is_not_locked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "lock_memory", lambda: False)
    server.run()
    assert any("RLIMIT_MEMLOCK" in line for line in server.said)


def test_it_says_when_memory_is_locked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "lock_memory", lambda: True)
    server.run()
    assert "memory is locked: no key is written to swap" in server.said


def test_while_it_serves_it_holds_neither_passphrase_nor_tokens(server: Server) -> None:
    def look() -> None:
        for secret in server.secrets:
            with secret.view() as view:
                assert not any(view)

    server.run(look)


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told_READY_and_STOPPING(
    server: Server, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    name = f"@mini-kms-test-{os.getpid()}" if abstract else str(server.directory / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        server.run()
        assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"STOPPING=1"


def test_a_service_manager_that_is_gone_is_no_reason_to_fail(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(server.directory / "nobody"))
    assert server.run() == EXIT_OK


def test_SIGHUP_reads_the_principals_again_and_stops_nothing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kms.server.reload")
    path = server.directory / "principals.toml"
    nobody = "[shared]\napi_token = true"
    path.touch(0o600)
    path.write_text(nobody)

    def reload(content: str, word: str) -> None:
        path.write_text(content)
        seen = len(caplog.records)
        os.kill(os.getpid(), signal.SIGHUP)
        eventually(word, lambda: any(word in record.getMessage() for record in caplog.records[seen:]))

    def client() -> None:
        me = f"[principals.me]\nuids = [{os.getuid()}]"
        with server.connect() as sock, sock.makefile("rb") as replies:

            def health() -> bytes:
                sock.sendall(b'{"type":"Health"}\n')
                return replies.readline()

            assert b"AuthFailed" in health()
            reload(me, "reloaded")
            assert b'"ok"' in health(), "the connection that was open stays, and so does who is at its other end"
            reload("nonsense", "not reloaded")
            assert b'"ok"' in health()
            reload("", "not reloaded")
            assert b'"ok"' in health(), "a file that has lost its content lets nobody else in"
            reload(nobody, "reloaded")
            assert b"AuthFailed" in health()

    assert server.run(client, principals=path) == EXIT_OK


def test_it_starts_with_a_file_of_principals_and_says_so(server: Server) -> None:
    path = server.directory / "principals.toml"
    path.write_text(f"[principals.me]\ngids = [{os.getgid()}]")
    path.chmod(0o600)
    answers: list[dict[str, Any]] = []
    server.run(lambda: answers.append(server.ask("Health", "")), principals=path)
    assert answers == [{"status": "ok", "detail": "ok"}]
    assert f"principals from {path}: 1" in server.said


@pytest.mark.parametrize(("content", "error"), [(None, InputMissingError), ("[principals.api]", ConfigError)])
def test_a_file_of_principals_that_cannot_be_used_stops_the_start_before_anything_is_made(
    server: Server, content: str | None, error: type[Exception]
) -> None:
    path = server.directory / "principals.toml"
    if content is not None:
        path.write_text(content)
        path.chmod(0o600)
    with pytest.raises(error, match=r"principals\.toml"):
        server.run(principals=path)
    assert not (server.directory / "keystore.json").exists()


def test_running_out_of_descriptors_pauses_accepting_and_does_not_end_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = _SocketType.accept
    failures = [OSError(24, "Too many open files")] * 2

    async def starved(sock: _SocketType) -> Any:
        result = await accept(sock)
        if failures:
            result[0].close()
            raise failures.pop()
        return result

    monkeypatch.setattr(_SocketType, "accept", starved)

    def client() -> None:
        for _ in range(2):
            with server.connect() as sock:
                assert sock.recv(10) == b""
        assert server.ask("Health")["status"] == "ok"

    server.run(client)


def test_a_bug_in_accepting_ends_the_server_and_does_not_hang_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(sock: _SocketType) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(_SocketType, "accept", broken)
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError), flatten_subgroups=True, allow_unwrapped=True):
        server.run(stop=None, no_tcp=True)
