"""Ways to abuse a server that need no token, or one; each checks that the server keeps the bound it tests.

A check that fails raises AssertionError. Times are seconds, sizes bytes. Where an attack takes as long as the bound it
tests, that bound is a parameter, so that the server can be started with a shorter one.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import struct
import time
from random import Random
from threading import Thread
from typing import Any, Final

import pytest

from kms.limits import MAX_CONNECTIONS, MAX_FRAME_BYTES
from kms_tests.integration.processes import DEADLINE, Server
from kms_tests.load.watch import TICK, wait_for

SLACK: Final = 17 / 16
"""What a server adds to an idle time, so that it need not move each deadline."""
HALF_A_FRAME: Final = b'{"type":"Hea'


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), DEADLINE)


def has_ended(sock: socket.socket) -> bool:
    """Whether the server has closed it, or reset it; does not wait."""
    readable = select.poll()
    readable.register(sock, select.POLLIN)
    try:
        return bool(readable.poll(0)) and sock.recv(1, socket.MSG_PEEK) == b""
    except ConnectionError:
        return True


def read_to_end(server: Server, sock: socket.socket) -> bytes:
    """All that the server sends until it closes the connection; a reset is an end, too."""
    received = bytearray()
    readable = select.poll()
    readable.register(sock, select.POLLIN)

    def comes() -> bool:
        return bool(readable.poll(int(TICK * 1000)))

    with contextlib.suppress(ConnectionError):
        while True:
            if not comes():
                wait_for(server, f"the server, which left it open after {bytes(received[:200])!r}, says more", comes)
            data = sock.recv(1 << 16)
            if not data:
                break
            received += data
    return bytes(received)


def error_codes(replies: bytes) -> list[str]:
    """The error code of each reply, of which none may be a success."""
    return [json.loads(line)["errorCode"] for line in replies.splitlines()]


def flood(server: Server, attempts: int = 5000, cap: int = MAX_CONNECTIONS - 1) -> None:
    """Connect, and stay. No more than `cap` are kept, of strangers the last; and a place let go is given again."""
    _allow_descriptors(attempts + 200)
    with contextlib.ExitStack() as crowd:
        everybody = [crowd.enter_context(connect(server)) for _ in range(attempts)]

        def kept() -> list[socket.socket]:
            return [sock for sock in everybody if not has_ended(sock)]

        wait_for(server, f"of {attempts} clients at most {cap} are kept", lambda: len(kept()) <= cap)
        assert len(kept()) == cap
        kept()[-1].sendall(b"{}\n")
        assert kept()[-1].recv(1000).endswith(b"\n"), "a client that is kept is not served"
    wait_for(server, "a newcomer is served", lambda: _is_served(server))


def _is_served(server: Server) -> bool:
    with connect(server) as newcomer:
        try:
            newcomer.sendall(b"{}\n")
            return newcomer.recv(1000).endswith(b"\n")
        except ConnectionError:
            return False


def _allow_descriptors(number: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        if hard < number:
            pytest.fail(f"this test needs {number} descriptors (ulimit -n), of which {hard} are allowed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


def slow_loris(server: Server, idle: float, clients: int = 100) -> None:
    """One byte a second does not keep a connection: each is cut off when its time is over, and not long before."""
    with contextlib.ExitStack() as crowd:
        begin = time.monotonic()
        alive = [crowd.enter_context(connect(server)) for _ in range(clients)]

        def drip() -> bool:
            for sock in alive:
                with contextlib.suppress(ConnectionError):
                    sock.send(b"{")
            alive[:] = [sock for sock in alive if not has_ended(sock)]
            return not alive

        while time.monotonic() - begin < idle * SLACK and not drip():
            time.sleep(1)
        wait_for(server, "clients of one byte a second are cut off", drip)
        assert time.monotonic() - begin > idle - 0.5, "they were cut off too early"


def half_open(server: Server, idle: float, clients: int = 50) -> None:
    """Clients that stop sending, that vanish amid their requests, and that fall silent amid a frame."""
    with contextlib.ExitStack() as crowd:
        silent = [crowd.enter_context(connect(server)) for _ in range(clients)]
        for sock in silent:
            sock.sendall(HALF_A_FRAME)
        for _ in range(clients):
            with connect(server) as stopped:
                stopped.sendall(b'{"type":"Health"}\n' + HALF_A_FRAME)
                stopped.shutdown(socket.SHUT_WR)
                assert error_codes(read_to_end(server, stopped)) == ["AuthFailed", "InvalidRequest"]
            with connect(server) as vanishing:
                vanishing.sendall(b'{"type":"Health"}\n' * 100)
                # Closing with a linger time of zero resets the connection.
                vanishing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_for(server, "silent clients are cut off", lambda: all(map(has_ended, silent)), idle * SLACK)


def oversized(server: Server, clients: int = 16) -> None:
    """A line over the limit is answered and the connection closed, also when the client never stops sending."""
    for _ in range(clients):
        with connect(server) as sock:
            sock.sendall(b"{" + b"x" * MAX_FRAME_BYTES)
            assert error_codes(read_to_end(server, sock)) == ["FrameTooLarge"]
    for _ in range(clients):
        with connect(server) as sock, contextlib.suppress(ConnectionError):
            for _ in range(64):
                sock.sendall(b"{" * MAX_FRAME_BYTES)
            raise AssertionError("the server took a line of 64 MiB")


def hoard(server: Server, idle: float, clients: int = 200) -> None:
    """As many frames as there is room for, each as long as it may be, and none ever whole."""
    with contextlib.ExitStack() as crowd:
        everybody = [crowd.enter_context(connect(server)) for _ in range(clients)]
        for sock in everybody:
            # It may be cut off before it has sent all.
            with contextlib.suppress(ConnectionError):
                sock.sendall(b"{" * (MAX_FRAME_BYTES - 1))
        wait_for(server, "who sends no whole frame is cut off", lambda: all(map(has_ended, everybody)), idle * SLACK)


def avalanche(server: Server, clients: int = 60) -> None:
    """Lines that are as long as may be and take as long as any to be refused, all of which end in the same instant."""
    opened = b'{"type":"Health","x":' + b"[" * 40
    line = opened + b'"",' * ((MAX_FRAME_BYTES - len(opened)) // 3)
    with contextlib.ExitStack() as crowd:
        everybody = [crowd.enter_context(connect(server)) for _ in range(clients)]
        for sock in everybody:
            sock.sendall(line)
        for sock in everybody:
            sock.sendall(b"\n")
        for sock in everybody:
            assert b"nested too deeply" in sock.recv(1024)


def deaf(server: Server, write_timeout: float, clients: int = 10) -> None:
    """Clients that ask for much and read nothing are cut off when their time is over."""
    request = {"type": "Encrypt", "token": server.machine.api_token, "plaintext": "A" * 200_000}
    line = json.dumps(request).encode() + b"\n"
    reset = select.poll()
    with contextlib.ExitStack() as crowd:
        for _ in range(clients):
            sock = crowd.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            # The less this side's kernel takes, the sooner the server has to wait.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(DEADLINE)
            sock.connect(("127.0.0.1", server.port))
            _fill(sock, line)
            reset.register(sock, 0)
        wait_for(server, "clients that read nothing are cut off", lambda: len(reset.poll(0)) == clients, write_timeout)


def _fill(sock: socket.socket, line: bytes) -> None:
    """Send until the other side takes no more."""
    sock.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        while True:
            sock.sendall(line)


def pipelined(server: Server, count: int = 100_000) -> float:
    """So many requests on one connection without waiting: each is answered, in order. Gives the seconds it took."""
    lines, answers = [], []
    with server.tcp() as wire:
        for text in ("QQ==", "Qg==", "Qw=="):
            sealed = wire.ask(type="Encrypt", token=server.machine.api_token, plaintext=text)["ciphertext"]
            request = {"type": "Decrypt", "token": server.machine.api_token, "ciphertext": sealed}
            lines.append(json.dumps(request).encode() + b"\n")
            answers.append(b'{"status":"ok","plaintext":"%s"}\n' % text.encode())
    order = Random(0).choices(range(3), k=count)
    with connect(server) as sock:
        begin = time.monotonic()

        def send() -> None:
            with contextlib.suppress(OSError):
                sock.sendall(b"".join(lines[number] for number in order))
                sock.shutdown(socket.SHUT_WR)

        sender = Thread(target=send)
        sender.start()
        try:
            received = read_to_end(server, sock)
        finally:
            sender.join()
        took = time.monotonic() - begin
    assert received == b"".join(answers[number] for number in order), "not every request was answered in its place"
    return took


def noise(server: Server, chance: Random, clients: int = 200) -> None:
    """Random bytes, and requests with random damage, get an error each, and never one that is the server's own fault."""
    for _ in range(clients):
        with connect(server) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(_garbage(chance))
                sock.shutdown(socket.SHUT_WR)
            codes = set(error_codes(read_to_end(server, sock)))
        assert codes <= {"InvalidRequest", "AuthFailed", "FrameTooLarge"}, codes


def _garbage(chance: Random) -> bytes:
    if chance.random() < 0.5:
        return b"{" + chance.randbytes(chance.randrange(1, 50_000))
    whole: dict[str, Any] = {
        "type": chance.choice(["Encrypt", "Decrypt", "RotateKeyGroup"]),
        "keyId": "default",
        "aad": "eA==",
    }
    damaged = bytearray((json.dumps(whole).encode() + b"\n") * 100)
    for _ in range(200):
        damaged[chance.randrange(1, len(damaged))] = chance.randrange(256)
    return bytes(damaged)


def come_and_go(server: Server, clients: int = 20) -> None:
    """Clients that come for one byte, or for nothing, and go."""
    for number in range(clients):
        with connect(server) as sock:
            if number % 2:
                sock.sendall(b"{")


def vanish_amid_a_change(server: Server, clients: int = 20) -> None:
    """Administrators that are gone before the first of their replies can be sent; the request after it changes a key."""
    health = {"type": "Health", "token": server.machine.api_token}
    rotate = {"type": "RotateKeyGroup", "token": server.machine.admin_token, "keyId": "default"}
    for _ in range(clients):
        # A Unix socket: what was sent is still there to be read after its sender has gone.
        with server.unix() as wire:
            wire.send(health, rotate)
