"""The control plane, and what a large keyring costs: mutations, saves beside the data plane, start-up, memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Final

import msgspec

from kms.core.derive import KdfParameters
from kms.core.keyring import KeyGroup, Keyring, KeySlot, KeyVersion, VersionStatus
from kms.core.secret import Secret
from kms.core.specs import AES_256
from kms.limits import UUID_BYTES
from kms.storage.file import Keystore, initialise
from kms.storage.lock import KeystoreLock
from kms_tests.integration.processes import PASSPHRASE, Server
from kms_tests.keks import group_of as made_group
from scripts.benchmark.processes import Bench, resident_mib, spread
from scripts.benchmark.turns import encoded, prepare

GROUPS: Final = (10, 1_000, 10_000)
VERSIONS: Final = {10: 5, 1_000: 3, 10_000: 3}
"""In each group; where there are few groups there are more, so that each of 32 clients has one of its own to change."""
IDLE_CONNECTIONS: Final = 256


class Mutations(msgspec.Struct, frozen=True, rename="camel"):
    """Mutations by some clients at once: how many per second, and how long each took, in milliseconds."""

    what: str
    groups: int
    clients: int
    rate: float
    p50: float
    p99: float


class Interference(msgspec.Struct, frozen=True, rename="camel"):
    """Encrypt's p99 in microseconds: alone, and beside another client; and their ratios."""

    beside: str
    connections: int
    quiet: float
    disturbed: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rate: float
    """What the other client got done per second."""


class Size(msgspec.Struct, frozen=True, rename="camel"):
    """What a server takes to be ready, and to be there: seconds and MiB."""

    groups: int
    keks: int
    start_up: float
    """From the start of the process to ready, with the smallest key derivation there is."""
    idle: float
    connected: float
    """With 256 idle connections."""


def data_directories(bench: Bench) -> dict[int, Path]:
    """For each number in `GROUPS` a data directory with that many, whose key derivation costs next to nothing."""
    made: dict[int, Path] = {}
    with bench.machine() as machine:
        for groups in GROUPS:
            path = made[groups] = bench.directory / f"{groups}-groups"
            path.mkdir(mode=0o700)
            for name in ("api.token", "admin.token"):
                shutil.copy(machine.data / name, path / name)
            fill(path / "keystore.json", groups)
    return made


def name_of(number: int) -> str:
    return f"group-{number:05}"


def fill(path: Path, groups: int) -> None:
    """A keystore with `default` and `groups - 1` others, of some versions each."""
    with KeystoreLock(path) as lock:
        parameters = KdfParameters(memory_kib=8, iterations=1, parallelism=1)
        with Secret(bytearray(PASSPHRASE.encode())) as passphrase:
            keystore, keyring = initialise(lock, passphrase, now=int(time.time()), parameters=parameters)
        names = ["default", *map(name_of, range(1, groups))]
        filled = Keyring(keyring.generation, {name: group_of(keystore, name, VERSIONS[groups]) for name in names})
        keystore.commit(keyring.generation, list(filled.groups.values()))


def group_of(keystore: Keystore, name: str, count: int) -> KeyGroup:
    now, uuid = int(time.time()), os.urandom(UUID_BYTES)
    versions = {}
    for number in range(1, count + 1):
        status = VersionStatus.ACTIVE if number == count else VersionStatus.ENABLED
        key, wrapped = keystore.mint(KeySlot(name, uuid, AES_256, number))
        versions[number] = KeyVersion.build(name, number, status, now, wrapped, key)
    return made_group(name, versions, created_at=now, uuid=uuid)


def rotations(server: Server) -> list[bytes]:
    """Requests that rotate ten groups in turn, so that none of them grows long."""
    token = server.machine.admin_token
    names = ["default", *map(name_of, range(1, 10))]
    return [encoded({"type": "RotateKeyGroup", "keyId": name, "token": token}) for name in names]


def toggles(server: Server, groups: int, clients: int) -> list[bytes]:
    """For each client two requests that disable and enable a version of its own, which makes nothing grow."""
    token = server.machine.admin_token
    slots = [(name_of(number), version) for version in range(1, VERSIONS[groups]) for number in range(1, min(groups, 33))]
    return [
        encoded({"type": kind, "keyId": name, "version": version, "token": token})
        for name, version in slots[:clients]
        for kind in ("DisableVersion", "EnableVersion")
    ]


def mutations(
    bench: Bench, directories: dict[int, Path], *, rounds: int, seconds: float, said: Callable[[str], None]
) -> list[Mutations]:
    """Mutations by one client and by 32 at once, for each number of groups; each on a server of its own."""
    rows = []
    for groups, directory in directories.items():
        for what, clients in (("rotate", 1), ("disable, enable", 1), ("disable, enable", 32)):
            said(f"{what} by {clients}, {groups} groups")
            results = []
            for _ in range(rounds):
                with bench.server(directory) as server:
                    requests = rotations(server) if what == "rotate" else toggles(server, groups, clients)
                    results.append(bench.load(f"unix:{server.socket}", clients, 1, seconds, *requests)[0])
            rows.append(
                Mutations(
                    what,
                    groups,
                    clients,
                    median([result.rate for result in results]),
                    median([result.p50 for result in results]) * 1e3,
                    median([result.p99 for result in results]) * 1e3,
                )
            )
    return rows


def interference(
    bench: Bench, directory: Path, *, rounds: int, seconds: float, said: Callable[[str], None]
) -> list[Interference]:
    """Encrypt by one client and by 32, first alone, then beside another client.

    That one rotates ten groups without pause, or keeps 100,000 requests under way.
    """
    rows = []
    for beside, connections in product(("rotations", "100,000 pipelined"), (1, 32)):
        said(f"Encrypt 32 B {connections}x1 beside {beside}")
        quiet, disturbed, rates = [], [], []
        for _ in range(rounds):
            with bench.server(directory) as server:
                address, encrypt = f"unix:{server.socket}", prepare(server)["Encrypt 32 B"].request
                depth, requests = (1, rotations(server)) if beside == "rotations" else (100_000, [encrypt])
                quiet.append(bench.load(address, connections, 1, seconds, encrypt)[0].p99)
                with bench.loading(address, 1, depth, seconds * 1.5, *requests) as other:
                    disturbed.append(bench.load(address, connections, 1, seconds, encrypt)[0].p99)
                    rates.append(other()[0].rate)
        ratios = [loud / still for loud, still in zip(disturbed, quiet, strict=True)]
        rows.append(
            Interference(
                beside,
                connections,
                median(quiet) * 1e6,
                median(disturbed) * 1e6,
                *spread(ratios),
                median(rates),
            )
        )
    return rows


def sizes(bench: Bench, directories: dict[int, Path], *, rounds: int, said: Callable[[str], None]) -> list[Size]:
    """Start-up and memory for each number of groups."""
    rows = []
    for groups, directory in directories.items():
        said(f"start-up with {groups} groups")
        took, idle, connected = [], [], []
        for _ in range(rounds):
            with bench.machine(directory) as machine:
                start = time.perf_counter()
                server = machine.start()
                took.append(time.perf_counter() - start)
                idle.append(resident_mib(server.pid))
                with contextlib.ExitStack() as clients:
                    for _connection in range(IDLE_CONNECTIONS):
                        client = clients.enter_context(socket.socket(socket.AF_UNIX))
                        client.connect(str(server.socket))
                    # Accepted one after the other: when the last one is answered, all are.
                    client.sendall(encoded({"type": "Health", "token": server.machine.api_token}))
                    client.recv(1024)
                    connected.append(resident_mib(server.pid))
        rows.append(Size(groups, groups * VERSIONS[groups], median(took), median(idle), median(connected)))
    return rows
