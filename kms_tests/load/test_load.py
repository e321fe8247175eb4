"""Whoever reaches the sockets stops nothing: each kind of abuse, with an honest client beside it.

The honest client holds its connection before the abuse begins. Its requests all succeed, 99 of 100 in less than a second
on a machine that has nothing else to do, and after the abuse the server has the descriptors it had before, and its memory
to within 10 MiB. How busy the machine is, is measured beside: by who asks an echo as often. That each of these checks can
fail is shown in `test_guards.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from random import Random
from typing import Final

import pytest

from kms.limits import IDLE_TIMEOUT, MAX_CONNECTIONS, MAX_FRAME_BYTES, WRITE_TIMEOUT
from kms_tests.faults import keystores
from kms_tests.integration.processes import Machine, Server
from kms_tests.load import attacks
from kms_tests.load.abuser import abused
from kms_tests.load.watch import unharmed, until_measured

MOST_FOR_LISTS: Final = 64 << 20
"""Bytes: a hundred whole lists would be 1.5 GiB."""
SHORT_IDLE: Final = 3.0
SHORT_SECONDS: Final = 20
MOST_ROTATIONS: Final = 10
"""Before there are as many, it is not over."""
LONG_SECONDS: Final = 600


@pytest.fixture
def idle(long: bool) -> float:
    """The seconds a frame may take: what a server has by default takes long to wait for."""
    return IDLE_TIMEOUT if long else SHORT_IDLE


@pytest.fixture
def server(machine: Machine, idle: float) -> Server:
    return machine.start("--idle-timeout-ms", str(int(idle * 1000)))


def test_5000_clients_at_a_door_for_256(machine: Machine) -> None:
    server = machine.start()
    with unharmed(server):
        attacks.flood(server)


def test_one_byte_a_second(server: Server, idle: float) -> None:
    with unharmed(server):
        attacks.slow_loris(server, idle)


def test_half_open_connections(server: Server, idle: float) -> None:
    with unharmed(server):
        attacks.half_open(server, idle)


def test_administrators_that_vanish_amid_a_change(server: Server) -> None:
    with unharmed(server):
        attacks.vanish_amid_a_change(server)


def test_lines_over_the_limit(server: Server) -> None:
    with unharmed(server):
        attacks.oversized(server)


def test_200_frames_of_1_MiB_that_never_end(server: Server, idle: float) -> None:
    with unharmed(server):
        for _ in range(2):
            attacks.hoard(server, idle)


def test_60_frames_of_1_MiB_that_end_at_once(machine: Machine) -> None:
    # With the idle time there is by default: sixty megabytes take a while to send on a busy machine.
    server = machine.start()
    with unharmed(server):
        attacks.avalanche(server)


def test_clients_that_never_read_their_replies(server: Server) -> None:
    with unharmed(server):
        attacks.deaf(server, WRITE_TIMEOUT)


def test_100_000_pipelined_requests(server: Server) -> None:
    with unharmed(server):
        took = attacks.pipelined(server)
    print(f"100,000 pipelined requests took {took:.1f} s")


def test_random_bytes(server: Server) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    with unharmed(server):
        attacks.noise(server, Random(seed))


def test_a_principal_without_a_grant_that_asks_as_fast_as_it_can(machine: Machine) -> None:
    (machine.data / "principals.toml").write_text(
        f'[shared]\n[principals.nobody]\ntoken_sha256 = ["{sha256(b"nobody").hexdigest()}"]\n', encoding="ascii"
    )
    (machine.data / "principals.toml").chmod(0o600)
    server = machine.start()
    line = b'{"type":"Encrypt","token":"nobody","plaintext":"QQ=="}\n'
    with unharmed(server) as honest, abused(server, "asks", connections=200, lines=line * 32):
        until_measured(server, honest)


def test_twenty_who_describe_a_key_group_of_10_000_versions(machine: Machine) -> None:
    keystores.make_large(machine.keystore, groups=1, versions=10_000)
    server = machine.start()
    line = f'{{"type":"DescribeKeyGroup","token":"{machine.admin_token}","keyId":"default"}}\n'.encode()
    with unharmed(server) as honest, abused(server, "asks", connections=20, lines=line):
        until_measured(server, honest)


def test_a_hundred_lists_of_100_000_versions_that_nobody_reads(machine: Machine) -> None:
    keystores.make_large(machine.keystore, groups=100, versions=1000)
    server = machine.start()
    line = f'{{"type":"ListKeyGroups","token":"{machine.admin_token}","usage":true}}\n'.encode()
    with (
        unharmed(server, most_memory=MOST_FOR_LISTS) as honest,
        abused(server, "demands", connections=100, lines=line * 10),
    ):
        until_measured(server, honest)


def test_256_silent_strangers_and_honest_newcomers(machine: Machine) -> None:
    server = machine.start()
    with unharmed(server, is_new=True) as honest, abused(server, "waits", connections=MAX_CONNECTIONS):
        until_measured(server, honest)


@pytest.mark.parametrize("shown", ["wrong", None])
def test_large_lines_of_strangers_beside_honest_ones_of_100_KiB(machine: Machine, shown: str | None) -> None:
    # Of the one it can be told at once that it is wrong; of the other not before the line is decoded.
    token = b"" if shown is None else b'"token":"%b",' % shown.encode()
    start = b'{"type":"Encrypt",%b"plaintext":"' % token
    line = start + b"A" * (MAX_FRAME_BYTES - len(start) - 6) + (b'"}\n' if shown else b"A\n")
    server = machine.start()
    with unharmed(server, size=75_000) as honest, abused(server, "asks", connections=200, lines=line):
        until_measured(server, honest)


def test_everything_at_once_with_a_rotation_every_second(server: Server, idle: float, long: bool) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    end = time.monotonic() + (LONG_SECONDS if long else SHORT_SECONDS)
    rotations: list[str] = []

    def rotate() -> None:
        with server.unix() as wire:
            rotations.append(wire.ask(type="RotateKeyGroup", token=server.machine.admin_token, keyId="default")["status"])
        time.sleep(1)

    abuses: list[Callable[[], object]] = [
        rotate,
        partial(attacks.noise, server, Random(seed), clients=20),
        partial(attacks.pipelined, server, count=2000),
        partial(attacks.oversized, server, clients=2),
        partial(attacks.half_open, server, idle, clients=20),
        partial(attacks.slow_loris, server, idle, clients=20),
        partial(attacks.come_and_go, server),
    ]

    def repeat(abuse: Callable[[], object]) -> None:
        while time.monotonic() < end or len(rotations) < MOST_ROTATIONS:
            abuse()

    with unharmed(server, clients=4), ThreadPoolExecutor(len(abuses)) as pool:
        for repeated in [pool.submit(repeat, abuse) for abuse in abuses]:
            repeated.result()
    assert set(rotations) == {"ok"}
    assert len(rotations) >= MOST_ROTATIONS
