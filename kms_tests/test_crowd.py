"""All connections together: who is at the other end of each, how many there may be, and how they end."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from typing import ClassVar

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kms.host.peer import Credentials
from kms.server.connection import ConnectionBounds
from kms.server.crowd import Crowd, peer_of
from kms.server.outbox import Outbox
from kms.service.pipeline import Later
from kms.service.served import Peer, Turn


async def test_the_kernel_vouches_for_who_connected_over_a_Unix_socket_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        credentials = Credentials(os.getpid(), os.getuid(), os.getgid())
        assert peer_of(ours, 7, "unix") == Peer(7, "unix", credentials)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        assert peer_of(sock, 7, "tcp") == Peer(7, "tcp", port=listener.getsockname()[1])


async def test_a_client_that_left_at_once_has_no_port_and_makes_no_noise() -> None:
    with socket.socket() as gone:
        assert peer_of(gone, 7, "tcp") == Peer(7, "tcp")


def nothing_to_do(turns: Sequence[Turn]) -> list[bytes | None]:
    return [None] * len(turns)


class Broken:
    """A session with a bug outside what it contains itself."""

    text = "canary"

    def __init__(self, peer: Peer) -> None:
        pass

    turn: ClassVar[Turn] = []

    def commit(self) -> bytes | None:
        return None

    def take(self) -> Turn:
        return []

    def serve(self, line: bytes) -> bytes | Later:
        raise RuntimeError(self.text)

    def reject(self, line: bytes) -> bytes | None:
        return None

    def frame_too_large(self, limit: int) -> bytes:
        return b""


async def test_one_connections_failure_never_touches_another(caplog: pytest.LogCaptureFixture) -> None:
    crowd = Crowd(Broken, ConnectionBounds(), Outbox(nothing_to_do), max_connections=2)
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    with theirs:
        theirs.sendall(b"{\n")
        await crowd.serve(ours, "unix")
        assert theirs.recv(10) == b""
    assert "RuntimeError" in caplog.text
    assert "canary" not in caplog.text


async def test_a_connection_that_the_kernel_does_not_vouch_for_is_closed_and_ends_no_other(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("kms.server.crowd.credentials_of", refuse)
    crowd = Crowd(Broken, ConnectionBounds(), Outbox(nothing_to_do), max_connections=2)
    ours, theirs = socket.socketpair()
    with theirs:
        await crowd.serve(ours, "unix")
        assert theirs.recv(10) == b""
    assert "a connection failed: OSError" in caplog.text


async def test_connections_are_counted_by_transport() -> None:
    crowd = Crowd(Broken, ConnectionBounds(), Outbox(nothing_to_do), max_connections=4)
    with contextlib.ExitStack() as held:
        async with trio.open_nursery() as nursery:
            clients = []
            for transport in ("unix", "tcp", "tcp", "tcp", "tcp"):
                ours, theirs = socket.socketpair()
                ours.settimeout(0)
                clients.append(held.enter_context(theirs))
                nursery.start_soon(crowd.serve, ours, transport)
                await wait_all_tasks_blocked()
            assert (crowd.open, crowd.refused, crowd.evicted) == ({"unix": 1, "tcp": 3}, {}, {"tcp": 1})
            clients[0].close()
            await wait_all_tasks_blocked()
            assert crowd.open == {"unix": 0, "tcp": 3}
            for client in clients[2:]:
                client.sendall(b"{fails\n")
        assert crowd.open == {"unix": 0, "tcp": 0}
        assert crowd.accepted == {"unix": 1, "tcp": 4}
        crowd.drain()
        ours, theirs = socket.socketpair()
        held.enter_context(theirs)
        await crowd.serve(ours, "unix")
        assert (crowd.refused, crowd.accepted) == ({}, {"unix": 1, "tcp": 4}), "the end of all is no refusal"


async def test_a_connection_that_arrives_while_draining_is_closed() -> None:
    crowd = Crowd(Broken, ConnectionBounds(), Outbox(nothing_to_do), max_connections=2)
    crowd.drain()
    ours, theirs = socket.socketpair()
    with theirs:
        await crowd.serve(ours, "unix")
        assert theirs.recv(10) == b""
