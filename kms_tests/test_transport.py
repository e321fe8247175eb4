"""The step that both clients share."""

from __future__ import annotations

import socket

from kms.client.protocol import Exchange, Requests
from kms.client.transport import advance
from kms.limits import PIPELINE_DEPTH

OK = b'{"status":"ok","detail":"ok"}\n'


def test_when_all_replies_come_at_once_the_next_requests_go_out_without_waiting_for_another() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(0)
        far.settimeout(5)
        health = Requests("token").health()
        exchange = Exchange([health] * (3 * PIPELINE_DEPTH))
        advance(near, exchange, "a test")
        for _ in range(3):
            assert far.recv(1 << 16).count(b"\n") == PIPELINE_DEPTH
            far.sendall(OK * PIPELINE_DEPTH)
            assert not advance(near, exchange, "a test"), "there is nothing that could not be sent"
        assert exchange.is_done
        assert exchange.results() == ["ok"] * (3 * PIPELINE_DEPTH)
