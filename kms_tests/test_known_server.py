from __future__ import annotations

import contextlib
import errno
import os
import pwd
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from kms.client import known_server
from kms.client.async_ import AsyncKmsClient
from kms.client.blocking import KmsClient
from kms.client.known_server import KnownServer, has_not_spoken, loopback
from kms.errors import ConfigError, ServerUnreachableError, UnknownServerError
from kms.host import sock_diag
from kms.host.peer import Credentials
from kms.host.sock_diag import FarEnd, far_end_of

OTHER = 54321
"""A uid that is nobody's here."""
OVERFLOW = 65534


@pytest.fixture(params=["127.0.0.1", "::1", "dual-stack"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    family = socket.AF_INET if request.param == "127.0.0.1" else socket.AF_INET6
    with socket.socket(family) as listening:
        if request.param == "dual-stack":
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            listening.bind(("::" if request.param == "dual-stack" else request.param, 0))
        except OSError:
            pytest.skip("no IPv6 here")
        listening.listen()
        yield listening


def connected_to(listening: socket.socket) -> socket.socket:
    host, port = listening.getsockname()[:2]
    return socket.create_connection(("127.0.0.1" if host == "::" else host, port))


def ends(link: socket.socket) -> FarEnd | None:
    return far_end_of(link.family, link.getsockname()[:2], link.getpeername()[:2])


def test_the_kernel_tells_whose_the_far_end_is(listener: socket.socket) -> None:
    with connected_to(listener) as link:
        far, _ = listener.accept()
        with far:
            assert ends(link) == FarEnd(os.geteuid(), is_held=True)


def test_a_connection_that_nobody_has_accepted_is_nobodys(listener: socket.socket) -> None:
    with connected_to(listener) as link:
        found = ends(link)
        assert found is None or not found.is_held


def test_a_far_end_that_was_closed_is_nobodys(listener: socket.socket) -> None:
    with connected_to(listener) as link:
        far, _ = listener.accept()
        far.sendall(b"ok")
        far.close()
        found = ends(link)
        assert found is None or not found.is_held


def test_a_connection_that_does_not_exist_is_not_taken_for_its_listener(listener: socket.socket) -> None:
    with connected_to(listener) as link:
        near, far = link.getsockname()[:2], link.getpeername()[:2]
    assert far_end_of(link.family, (near[0], 1), far) is None


def test_a_kernel_without_sock_diag_is_an_error(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    monkeypatch.setattr(sock_diag, "_NETLINK_SOCK_DIAG", 31)
    with connected_to(listener) as link, pytest.raises(OSError, match="rotocol"):
        ends(link)
    with connected_to(listener) as link, pytest.raises(UnknownServerError, match="does not say"):
        KnownServer().is_tcp_known(link, "here")


def test_another_network_namespace_is_not_found() -> None:
    program = (
        "import socket, sys\n"
        "from kms.host.sock_diag import far_end_of\n"
        "print(far_end_of(socket.AF_INET, ('127.0.0.1', int(sys.argv[1])), ('127.0.0.1', int(sys.argv[2]))))\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as link:
        far, _ = listening.accept()
        with far:
            ports = [str(link.getsockname()[1]), str(link.getpeername()[1])]
            here = subprocess.run([sys.executable, "-c", program, *ports], capture_output=True, text=True, check=False)
            there = subprocess.run(
                ["unshare", "-n", sys.executable, "-c", program, *ports], capture_output=True, text=True, check=False
            )
    if there.returncode and "unshare" in there.stderr:
        pytest.skip("no network namespaces here")
    assert "is_held=True" in here.stdout
    assert there.stdout == "None\n"


def test_who_may_be_the_server_over_tcp(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    def answer(far: FarEnd | None) -> None:
        monkeypatch.setattr(known_server, "far_end_of", lambda *_: far)

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with connected_to(listener) as link:
        for uid in (1000, 0):
            answer(FarEnd(uid, is_held=True))
            assert KnownServer().is_tcp_known(link, "here")
        answer(FarEnd(0, is_held=False))
        assert not KnownServer().is_tcp_known(link, "here")
        answer(FarEnd(OTHER, is_held=True))
        with pytest.raises(UnknownServerError, match=f"a process of user {OTHER}.*--server-user"):
            KnownServer().is_tcp_known(link, "here")
        assert KnownServer(OTHER).is_tcp_known(link, "here")
        assert KnownServer(str(OTHER)).is_tcp_known(link, "here")
        assert KnownServer("any").is_tcp_known(link, "here")
        answer(FarEnd(OVERFLOW, is_held=True))
        for user in (None, OVERFLOW):
            with pytest.raises(UnknownServerError, match="overflow"):
                KnownServer(user).is_tcp_known(link, "here")
        answer(None)
        with pytest.raises(UnknownServerError, match="another network namespace"):
            KnownServer().is_tcp_known(link, "here")


def test_who_may_be_the_server_over_a_unix_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    near, far = socket.socketpair()

    def peer(uid: int) -> None:
        monkeypatch.setattr(known_server, "credentials_of", lambda _: Credentials(1, uid, 1))

    def owned_by(uid: int, path: Path) -> str:
        path.mkdir()
        os.chown(path, uid, -1)
        return str(path / "kms.sock")

    ours = str(tmp_path / "kms.sock")
    with near, far:
        peer(OTHER)
        with pytest.raises(UnknownServerError, match="no token was sent"):
            KnownServer().check_unix(near, ours)
        KnownServer(OTHER).check_unix(near, ours)
        KnownServer("any").check_unix(near, ours)
        if os.geteuid() == 0:
            KnownServer().check_unix(near, owned_by(OTHER, tmp_path / "theirs"))
            # A symbolic link in a directory that anybody may write to leads wherever its maker likes.
            (tmp_path / "link").symlink_to(tmp_path / "theirs" / "kms.sock")
            with pytest.raises(UnknownServerError):
                KnownServer().check_unix(near, str(tmp_path / "link"))
            peer(OVERFLOW)
            with pytest.raises(UnknownServerError, match="overflow"):
                KnownServer().check_unix(near, owned_by(OVERFLOW, tmp_path / "nobodys"))
        peer(0)
        KnownServer().check_unix(near, ours)
        monkeypatch.setattr(known_server, "credentials_of", lambda _: (_ for _ in ()).throw(OSError(errno.EPERM, "no")))
        with pytest.raises(UnknownServerError, match="does not say"):
            KnownServer().check_unix(near, ours)


def test_the_servers_user_is_a_name_or_a_uid() -> None:
    name = pwd.getpwuid(0).pw_name
    KnownServer(name)
    for wrong in ("", "no-such-user-here", "-1", -1, 1 << 32, "9" * 5000, "a\0b"):
        with pytest.raises(ConfigError, match="the server's user"):
            KnownServer(wrong)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("localhost", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1"),
        ("127.9.8.7", "127.9.8.7"),
        ("::1", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
def test_loopback_is_a_numeric_address_or_localhost(host: str, address: str) -> None:
    assert loopback(host) == address


@pytest.mark.parametrize(
    "host",
    [
        "",
        "0.0.0.0",
        "::",
        "192.0.2.1",
        "::ffff:192.0.2.1",
        "fe80::1",
        "::1%lo",
        "127.1",
        "127.0.0.01",
        "0x7f.0.0.1",
        "2130706433",
        "LOCALHOST",
        "localhost.",
        "localhost.example",
        "ip6-localhost",
        " 127.0.0.1",
        "127.0.0.1\n",
        "\u0661\u0662\u0667.0.0.1",
    ],
)
def test_no_other_address_is_connected_to(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("a name was looked up"))
    with pytest.raises(ConfigError, match="loopback"):
        loopback(host)
    with pytest.raises(ConfigError, match="loopback"):
        KmsClient.connect_tcp(host, 9, token="t")


async def test_nor_by_the_client_for_trio() -> None:
    with pytest.raises(ConfigError, match="loopback"):
        await AsyncKmsClient.connect_tcp("192.0.2.1", 9, token="t")


class Imposter(threading.Thread):
    """Does `act` with the first connection to it, and then keeps what it was sent."""

    def __init__(self, *, says: bytes = b"", closes: bool = False) -> None:
        super().__init__(daemon=True)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.heard = b""
        self._says = says
        self._closes = closes

    def run(self) -> None:
        link, _ = self.listening.accept()
        with link:
            link.sendall(self._says)
            if self._closes:
                return
            # Reset, where what it said was never read.
            with contextlib.suppress(ConnectionResetError):
                while data := link.recv(4096):
                    self.heard += data


def test_a_server_that_speaks_first_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    imposter = Imposter(says=b'{"status":"ok","detail":"ok"}\n')
    imposter.start()
    with imposter.listening:
        client = KmsClient.connect_tcp(port=imposter.port, token="t0ken")
        while not _has_come(client._links._new):
            pass
        with pytest.raises(UnknownServerError, match="before it was asked"):
            client.health()
        imposter.join(10)
    assert imposter.heard == b""


def _has_come(link: socket.socket | None) -> bool:
    assert link is not None
    try:
        has_not_spoken(link, "here")
    except UnknownServerError:
        return True
    return False


async def test_nor_is_it_for_the_client_for_trio() -> None:
    imposter = Imposter(says=b"220 smtp.example\r\n")
    imposter.start()
    with imposter.listening:
        client = await AsyncKmsClient.connect_tcp(port=imposter.port, token="t0ken")
        while not _has_come(client._links._new):
            await trio.lowlevel.checkpoint()
        with pytest.raises(UnknownServerError, match="before it was asked"):
            await client.health()
        await trio.to_thread.run_sync(imposter.join)
    assert imposter.heard == b""


@pytest.mark.parametrize("is_before", [True, False])
def test_who_answers_and_closes_before_or_after_the_check_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, *, is_before: bool
) -> None:
    imposter = Imposter(says=b'{"status":"ok","detail":"ok"}\n', closes=True)

    def checked(family: int, near: tuple[str, int], far: tuple[str, int]) -> FarEnd | None:
        if is_before and imposter.ident is None:
            imposter.start()
            imposter.join(10)
        found = far_end_of(family, near, far)
        if not is_before:
            imposter.start()
            imposter.join(10)
            return FarEnd(os.getuid(), is_held=True)
        return found

    monkeypatch.setattr("kms.client.known_server.far_end_of", checked)
    with imposter.listening, pytest.raises((UnknownServerError, ServerUnreachableError)):
        KmsClient.connect_tcp(port=imposter.port, token="t0ken", timeout=0.3).health()
    assert imposter.heard == b""


@pytest.mark.parametrize("timeout", [0.05])
def test_a_connection_that_nobody_accepts_is_given_up_at_the_time_limit(timeout: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(ServerUnreachableError, match="did not answer"):
        KmsClient.connect_tcp(port=listening.getsockname()[1], token="t", timeout=timeout)


async def test_as_it_is_by_the_client_for_trio() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(ServerUnreachableError, match="did not answer"):
        await AsyncKmsClient.connect_tcp(port=listening.getsockname()[1], token="t", timeout=0.05)


def test_a_server_that_accepts_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def counted(family: int, near: tuple[str, int], far_address: tuple[str, int]) -> FarEnd | None:
        nonlocal asked
        asked += 1
        if asked == 3:
            far.append(listening.accept()[0])
        return far_end_of(family, near, far_address)

    monkeypatch.setattr(known_server, "far_end_of", counted)
    far: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        KmsClient.connect_tcp(port=listening.getsockname()[1], token="t").close()
    assert asked == 3
    far[0].close()
