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
from typing import Any, Final

import msgspec

from kms_tests.integration.processes import Server
from scripts.benchmark.processes import Bench, BenchmarkError, LoadResult, cpu_seconds, pin, resident_mib

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
            unix = transport == "unix"
            address = f"unix:{server.socket}" if unix else f"tcp:{server.port}"
            echo_address = f"unix:{echo_socket}" if unix else f"tcp:{echo_port}"
            ours: list[LoadResult] = []
            theirs: list[LoadResult] = []
            cpu: list[float] = []
            busy: list[float] = []
            echo_busy: list[float] = []
            for number in range(rounds):
                # Each goes first in every other round: a machine that slows down meanwhile favours neither.
                for is_ours in (number % 2 == 0, number % 2 == 1):
                    before, start = cpu_seconds(server.pid if is_ours else echo_pid), time.perf_counter()
                    where = address if is_ours else echo_address
                    result, replies = bench.load(where, connections, depth, seconds, work.request, alone=True)
                    used = cpu_seconds(server.pid if is_ours else echo_pid) - before
                    share = used / (time.perf_counter() - start)
                    if not is_ours:
                        theirs.append(result)
                        echo_busy.append(share)
                        continue
                    if not all(work.is_right(json.loads(reply)) for reply in replies[:SAMPLES]):
                        raise BenchmarkError(f"a reply to {what} is wrong")
                    ours.append(result)
                    cpu.append(used / result.total)
                    busy.append(share)
            rows.append(
                _row(
                    work.name,
                    transport,
                    connections,
                    depth,
                    seconds,
                    ours,
                    theirs,
                    cpu,
                    resident_mib(server.pid),
                    (median(busy), median(echo_busy)),
                )
            )
    return rows


def _row(
    operation: str,
    transport: str,
    connections: int,
    depth: int,
    seconds: float,
    ours: list[LoadResult],
    theirs: list[LoadResult],
    cpu: list[float],
    resident: float,
    busy: tuple[float, float],
) -> Row:
    ratios = [our.rate / their.rate for our, their in zip(ours, theirs, strict=True)]
    return Row(
        operation=operation,
        transport=transport,
        connections=connections,
        depth=depth,
        rate=median([our.rate for our in ours]),
        echo_rate=median([their.rate for their in theirs]),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        p50=median([our.p50 for our in ours]) * 1e6,
        p99=median([our.p99 for our in ours]) * 1e6,
        max=median([our.max for our in ours]) * 1e6,
        echo_p50=median([their.p50 for their in theirs]) * 1e6,
        echo_p99=median([their.p99 for their in theirs]) * 1e6,
        busy=busy[0],
        echo_busy=busy[1],
        cpu_per_request=median(cpu) * 1e6,
        resident_mib=resident,
        load_busy=1 - median([our.waited for our in ours]) / seconds,
        echo_load_busy=1 - median([their.waited for their in theirs]) / seconds,
        target=TARGETS.get((operation, connections, depth)) if transport == "unix" else None,
    )
