"""The data plane beside the bare echo: the same lines over the same connections, in turns."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any, Final, NamedTuple

import msgspec

from kms_tests.integration.processes import Server
from scripts.benchmark.processes import Bench, BenchmarkError, LoadResult, cpu_seconds, pin, resident_mib, spread

SHAPES: Final = ((1, 1), (32, 1), (32, 16), (256, 1))
"""Connections x requests under way on each."""

TARGETS: Final = {
    ("Encrypt 32 B", 1, 1): 0.85,
    ("Encrypt 32 B", 32, 1): 0.85,
    ("Encrypt 32 B", 256, 1): 0.85,
    ("Encrypt 32 B", 32, 16): 0.17,
    ("Encrypt 4 KiB", 32, 1): 0.6,
}
"""The least ratio to the echo, over the Unix socket."""

SAMPLES: Final = 4
"""Replies of each run that are decrypted; of all it is checked that they are ok."""


class Row(msgspec.Struct, frozen=True, rename="camel"):
    """One operation in one shape: rates per second, times in microseconds, each the median of the rounds."""

    operation: str
    transport: str
    connections: int
    depth: int
    rate: float
    echo_rate: float
    ratio: float
    ratio_low: float
    ratio_high: float
    p50: float
    p99: float
    max: float
    echo_p50: float
    echo_p99: float
    busy: float
    """CPU time of the server as a share of the time: far from 1 with 32 clients, something else took its core."""
    echo_busy: float
    cpu_per_request: float
    resident_mib: float
    load_busy: float
    """The share of the time for which the load generator was at work; near 1 it would be the bottleneck."""
    echo_load_busy: float
    target: float | None


@dataclass(frozen=True)
class Work:
    """One operation: the line to send, how long the line of its reply is, and whether a reply is right."""

    name: str
    request: bytes
    reply_bytes: int
    is_right: Callable[[dict[str, str]], bool]


def encoded(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def prepare(server: Server) -> dict[str, Work]:
    """The operations of the data plane by name, with a token and a ciphertext of `server`."""
    token = server.machine.api_token

    def ask(request: dict[str, str]) -> dict[str, str]:
        with server.unix() as wire:
            return wire.ask(token=token, **request)

    def opens(ciphertext: str, plaintext: str) -> bool:
        return ask({"type": "Decrypt", "ciphertext": ciphertext})["plaintext"] == plaintext

    small = base64.b64encode(os.urandom(32)).decode()
    large = base64.b64encode(os.urandom(4096)).decode()
    sealed = ask({"type": "Encrypt", "plaintext": small})["ciphertext"]
    asked: dict[str, tuple[dict[str, str], Callable[[dict[str, str]], bool]]] = {
        "Health": ({"type": "Health"}, lambda reply: reply["detail"] == "ok"),
        "Encrypt 32 B": ({"type": "Encrypt", "plaintext": small}, lambda reply: opens(reply["ciphertext"], small)),
        "Encrypt 4 KiB": ({"type": "Encrypt", "plaintext": large}, lambda reply: opens(reply["ciphertext"], large)),
        "Decrypt 32 B": ({"type": "Decrypt", "ciphertext": sealed}, lambda reply: reply["plaintext"] == small),
        "GenerateDataKey": (
            {"type": "GenerateDataKey"},
            lambda reply: opens(reply["wrappedDataKey"], reply["plaintextDataKey"]),
        ),
    }
    return {
        name: Work(name, encoded({**request, "token": token}), len(encoded(ask(request))), is_right)
        for name, (request, is_right) in asked.items()
    }


def measure(
    bench: Bench, *, rounds: int, seconds: float, said: Callable[[str], None], chosen: Callable[[str], bool]
) -> list[Row]:
    """All operations in all shapes over both transports; `chosen` says which, by names like "unix Encrypt 32 B 32x1"."""
    rows: list[Row] = []
    with bench.server() as server, contextlib.ExitStack() as echoes:
        works = prepare(server)
        # As long as Encrypt's replies: of 4 KiB for the one, of 32 bytes for all the others.
        large, small = (
            echoes.enter_context(bench.echo(works[name].reply_bytes)) for name in ("Encrypt 4 KiB", "Encrypt 32 B")
        )
        for transport, (connections, depth), work in product(("unix", "tcp"), SHAPES, works.values()):
            what = f"{transport} {work.name} {connections}x{depth}"
            if not chosen(what):
                continue
            said(what)
            for pid in (server.pid, large[0], small[0]):
                pin(pid, 0)
            echo_pid, echo_socket, echo_port = large if work.name == "Encrypt 4 KiB" else small
            if transport == "unix":
                us, echo = (server.pid, f"unix:{server.socket}"), (echo_pid, f"unix:{echo_socket}")
            else:
                us, echo = (server.pid, f"tcp:{server.port}"), (echo_pid, f"tcp:{echo_port}")
            ours: list[Turn] = []
            theirs: list[Turn] = []
            for number in range(rounds):
                # Each goes first in every other round: a machine that slows down meanwhile favours neither.
                for whom, turns in ((us, ours), (echo, theirs))[:: 1 if number % 2 == 0 else -1]:
                    turns.append(_turn(bench, *whom, connections, depth, seconds, work.request))
                if not all(work.is_right(json.loads(reply)) for reply in ours[-1].replies[:SAMPLES]):
                    raise BenchmarkError(f"a reply to {what} is wrong")
            rows.append(_row(work.name, transport, connections, depth, seconds, ours, theirs, resident_mib(server.pid)))
    return rows


class Turn(NamedTuple):
    """One load of one server: what the load saw, and the server's CPU time, per request and as a share of the time."""

    load: LoadResult
    replies: list[bytes]
    cpu_per_request: float
    busy: float


def _turn(bench: Bench, pid: int, address: str, connections: int, depth: int, seconds: float, request: bytes) -> Turn:
    before, start = cpu_seconds(pid), time.perf_counter()
    result, replies = bench.load(address, connections, depth, seconds, request, alone=True)
    used = cpu_seconds(pid) - before
    return Turn(result, replies, used / result.total, used / (time.perf_counter() - start))


def _row(
    operation: str,
    transport: str,
    connections: int,
    depth: int,
    seconds: float,
    ours: list[Turn],
    theirs: list[Turn],
    resident: float,
) -> Row:
    def of(turns: list[Turn], value: Callable[[LoadResult], float]) -> float:
        return median([value(turn.load) for turn in turns])

    ratio, low, high = spread([our.load.rate / their.load.rate for our, their in zip(ours, theirs, strict=True)])
    return Row(
        operation=operation,
        transport=transport,
        connections=connections,
        depth=depth,
        rate=of(ours, lambda load: load.rate),
        echo_rate=of(theirs, lambda load: load.rate),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        p50=of(ours, lambda load: load.p50) * 1e6,
        p99=of(ours, lambda load: load.p99) * 1e6,
        max=of(ours, lambda load: load.max) * 1e6,
        echo_p50=of(theirs, lambda load: load.p50) * 1e6,
        echo_p99=of(theirs, lambda load: load.p99) * 1e6,
        busy=median([our.busy for our in ours]),
        echo_busy=median([their.busy for their in theirs]),
        cpu_per_request=median([our.cpu_per_request for our in ours]) * 1e6,
        resident_mib=resident,
        load_busy=1 - of(ours, lambda load: load.waited) / seconds,
        echo_load_busy=1 - of(theirs, lambda load: load.waited) / seconds,
        target=TARGETS.get((operation, connections, depth)) if transport == "unix" else None,
    )
