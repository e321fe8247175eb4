"""Many connections that abuse a server for as long as they are let, in a process of their own.

    python -m kms_tests.load.abuser KIND PORT CONNECTIONS < LINES

Each connection, again and again, and anew where the server ends it:

- `asks` sends all LINES at once, and reads as many replies;
- `demands` sends them, and reads nothing;
- `waits` sends nothing.

It says `begun` once each connection has done so for the first time, or has been ended.
"""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from kms_tests.integration.processes import ROOT, Server

_CHUNK = 1 << 16


def _asks(sock: socket.socket, lines: bytes) -> Iterator[None]:
    wanted = lines.count(b"\n")
    while True:
        sock.sendall(lines)
        got = 0
        while got < wanted:
            data = sock.recv(_CHUNK)
            if not data:
                return
            got += data.count(b"\n")
        yield


def _demands(sock: socket.socket, lines: bytes) -> Iterator[None]:
    sock.sendall(lines)
    yield
    _wait_for_the_end(sock)


def _waits(sock: socket.socket, lines: bytes) -> Iterator[None]:
    yield
    _wait_for_the_end(sock)


def _wait_for_the_end(sock: socket.socket) -> None:
    ended = select.poll()
    ended.register(sock, select.POLLRDHUP)
    ended.poll()


KINDS: dict[str, Callable[[socket.socket, bytes], Iterator[None]]] = {"asks": _asks, "demands": _demands, "waits": _waits}


def main(kind: str, port: str, connections: str) -> None:
    lines = sys.stdin.buffer.read()
    first = threading.Barrier(int(connections) + 1)

    def abuse() -> None:
        is_first = True
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port))) as sock:
                # The less this side's kernel takes, the sooner the server has to wait.
                if kind == "demands":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                for _ in KINDS[kind](sock, lines):
                    if is_first:
                        is_first = False
                        first.wait()
            if is_first:
                is_first = False
                first.wait()
            # Who is turned away at once is not to use up the ports.
            time.sleep(0.01)

    for _ in range(int(connections)):
        threading.Thread(target=abuse, daemon=True).start()
    first.wait()
    print("begun", flush=True)
    threading.Event().wait()


@contextlib.contextmanager
def abused(server: Server, kind: str, *, connections: int, lines: bytes = b"") -> Iterator[None]:
    """While this is open, `server` is abused so; see this module."""
    command = [sys.executable, "-m", __name__, kind, str(server.port), str(connections)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(lines)
            process.stdin.close()
            assert process.stdout.readline() == b"begun\n"
            yield
        finally:
            process.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
