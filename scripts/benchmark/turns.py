"""Two servers under the same load, in turns: what comes out is how they compare, whatever the machine does meanwhile."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, NamedTuple

import msgspec

from kms_tests.integration.processes import Server
from scripts.benchmark.processes import Bench, BenchmarkError, LoadResult, cpu_seconds, pin, resident_mib, spread

SAMPLES: Final = 4
"""Replies of each run that are decrypted; of all it is checked that they are ok."""


class Row(msgspec.Struct, frozen=True, rename="camel"):
    """One operation in one shape: rates per second, times in microseconds, each the median of the rounds."""

    operation: str
    transport: str
    connections: int
    depth: int
    server: str
    """What is measured, and beside what."""
    other: str
    rate: float
    other_rate: float
    ratio: float
    ratio_low: float
    ratio_high: float
    p50: float
    p99: float
    max: float
    other_p50: float
    other_p99: float
    busy: float
    """CPU time of the server as a share of the time: far from 1 with 32 clients, something else took its core."""
    other_busy: float
    cpu_per_request: float
    other_cpu_per_request: float
    resident_mib: float
    load_busy: float
    """The share of the time for which the load generator was at work; near 1 it would be the bottleneck."""
    other_load_busy: float
    replies: int
    """In all rounds together, warm-up included."""
    target: float | None
    """The least that the ratio should be."""


@dataclass(frozen=True)
class Work:
    """One operation: the line to send, how long the line of its reply is, and whether a reply is right."""

    name: str
    request: bytes
    reply_bytes: int
    is_right: Callable[[dict[str, str]], bool]


class Shape(NamedTuple):
    """How many connections, and how many requests are under way on each."""

    connections: int
    depth: int


@dataclass(frozen=True)
class Side:
    """One of the two: what it is called, its process, its address as `Bench.load` takes it, and what it is asked to do."""

    name: str
    pid: int
    address: str
    work: Work
    is_checked: bool = True
    """Whether its replies are to be right; those of an echo are not."""

    @classmethod
    def of(cls, name: str, server: Server, work: Work, transport: str = "unix") -> Side:
        """A kms-server."""
        return cls(name, server.pid, f"unix:{server.socket}" if transport == "unix" else f"tcp:{server.port}", work)

    def check(self, replies: Sequence[bytes]) -> None:
        """Raise `BenchmarkError` unless some of `replies` are right."""
        if self.is_checked and not all(self.work.is_right(json.loads(reply)) for reply in replies[:SAMPLES]):
            raise BenchmarkError(f"{self.name}: a reply to {self.work.name} is wrong")


def encoded(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def prepare(server: Server, token: str | None = None) -> dict[str, Work]:
    """The operations of the data plane by name, with a ciphertext of `server` and `token`, or else its API token."""
    shown = token or server.machine.api_token

    def ask(request: dict[str, str]) -> dict[str, str]:
        with server.unix() as wire:
            return wire.ask(token=shown, **request)

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
        name: Work(name, encoded({**request, "token": shown}), len(encoded(ask(request))), is_right)
        for name, (request, is_right) in asked.items()
    }


def compare(
    bench: Bench, ours: Side, theirs: Side, shape: Shape, *, rounds: int, seconds: float, target: float | None
) -> Row:
    """Load one side and then the other, `rounds` times for some seconds each; raises `BenchmarkError`."""
    for side in (ours, theirs):
        pin(side.pid, 0)
    our_turns: list[Turn] = []
    their_turns: list[Turn] = []
    for number in range(rounds):
        # Each goes first in every other round: a machine that slows down meanwhile favours neither.
        for side, turns in ((ours, our_turns), (theirs, their_turns))[:: 1 if number % 2 == 0 else -1]:
            turns.append(_turn(bench, side, shape, seconds))
        for side, turns in ((ours, our_turns), (theirs, their_turns)):
            side.check(turns[-1].replies)

    def of(turns: list[Turn], value: Callable[[LoadResult], float]) -> float:
        return median([value(turn.load) for turn in turns])

    ratio, low, high = spread([our.load.rate / their.load.rate for our, their in zip(our_turns, their_turns, strict=True)])
    return Row(
        operation=ours.work.name,
        transport=ours.address.partition(":")[0],
        connections=shape.connections,
        depth=shape.depth,
        server=ours.name,
        other=theirs.name,
        rate=of(our_turns, lambda load: load.rate),
        other_rate=of(their_turns, lambda load: load.rate),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        p50=of(our_turns, lambda load: load.p50) * 1e6,
        p99=of(our_turns, lambda load: load.p99) * 1e6,
        max=of(our_turns, lambda load: load.max) * 1e6,
        other_p50=of(their_turns, lambda load: load.p50) * 1e6,
        other_p99=of(their_turns, lambda load: load.p99) * 1e6,
        busy=median([our.busy for our in our_turns]),
        other_busy=median([their.busy for their in their_turns]),
        cpu_per_request=median([our.cpu_per_request for our in our_turns]) * 1e6,
        other_cpu_per_request=median([their.cpu_per_request for their in their_turns]) * 1e6,
        resident_mib=resident_mib(ours.pid),
        load_busy=1 - of(our_turns, lambda load: load.waited) / seconds,
        other_load_busy=1 - of(their_turns, lambda load: load.waited) / seconds,
        replies=sum(turn.load.total for turn in our_turns),
        target=target,
    )


class Turn(NamedTuple):
    """One load of one server: what the load saw, and the server's CPU time, per request and as a share of the time."""

    load: LoadResult
    replies: list[bytes]
    cpu_per_request: float
    busy: float


def _turn(bench: Bench, side: Side, shape: Shape, seconds: float) -> Turn:
    before, start = cpu_seconds(side.pid), time.perf_counter()
    result, replies = bench.load(side.address, *shape, seconds, side.work.request, alone=True)
    used = cpu_seconds(side.pid) - before
    return Turn(result, replies, used / result.total, used / (time.perf_counter() - start))
