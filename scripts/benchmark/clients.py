"""The client library: single calls beside `encrypt_many`."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Final

import msgspec
import trio

from kms import AsyncKmsClient, KmsClient
from kms_tests.integration.processes import Server
from scripts.benchmark.processes import Bench, spread

ITEMS: Final = 10_000
ITEM: Final = b"sixteen bytes..."


class Client(msgspec.Struct, frozen=True, rename="camel"):
    """One client: Encrypt of small items per second, one by one and with `encrypt_many`, and the ratio of the two."""

    name: str
    single: float
    many: float
    ratio: float
    ratio_low: float
    ratio_high: float


def measure(bench: Bench, *, rounds: int, items: int, said: Callable[[str], None]) -> list[Client]:
    """Both clients over the Unix socket, single calls and `encrypt_many` in turns."""
    rows = []
    with bench.server() as server:
        for name, run in (("KmsClient", _blocking), ("AsyncKmsClient", _async)):
            said(f"{name}, {items} items")
            pairs = [run(server, items) for _ in range(rounds)]
            ratios = [single / many for single, many in pairs]
            rows.append(
                Client(
                    name,
                    items / median([single for single, _ in pairs]),
                    items / median([many for _, many in pairs]),
                    *spread(ratios),
                )
            )
    return rows


def _blocking(server: Server, items: int) -> tuple[float, float]:
    with KmsClient.connect_unix(server.socket, token=server.machine.api_token) as client:
        start = time.perf_counter()
        for _ in range(items):
            client.encrypt(ITEM)
        single = time.perf_counter() - start
        start = time.perf_counter()
        client.encrypt_many([ITEM] * items)
        return single, time.perf_counter() - start


def _async(server: Server, items: int) -> tuple[float, float]:
    async def run() -> tuple[float, float]:
        async with await AsyncKmsClient.connect_unix(server.socket, token=server.machine.api_token) as client:
            start = time.perf_counter()
            for _ in range(items):
                await client.encrypt(ITEM)
            single = time.perf_counter() - start
            start = time.perf_counter()
            await client.encrypt_many([ITEM] * items)
            return single, time.perf_counter() - start

    return trio.run(run)
