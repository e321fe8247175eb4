"""The control plane is linearizable, across kills and restarts.

Several clients at once ask a real server for random operations on a few groups, which is killed (or stopped) and started
again in between. What they saw, group by group, has to be what one group that does one thing at a time could have
answered. Three servers with a bug show that the check would notice.
"""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any, Final

import pytest

from kms.core import ciphertext
from kms.core.derive import KdfParameters
from kms.core.secret import Secret
from kms.storage.file import initialise
from kms.storage.lock import KeystoreLock
from kms_tests.faults.linearizability import Call, Done, Group, Kind, Operation, Refused, Reply, Saw, Sealed, objection
from kms_tests.integration.processes import DEADLINE, PASSPHRASE, Machine, Server, eventually

GROUPS: Final = ("a", "b", "c", "d")
CLIENTS: Final = 8
ROUNDS: Final = 20
"""Starts of the server in one history."""
LONG_SECONDS: Final = 2 * 3600

TYPES: Final = {
    Kind.CREATE: "CreateKeyGroup",
    Kind.ROTATE: "RotateKeyGroup",
    Kind.DISABLE: "DisableVersion",
    Kind.ENABLE: "EnableVersion",
    Kind.DESTROY: "DestroyVersion",
    Kind.LIST: "ListKeyGroups",
    Kind.ENCRYPT: "Encrypt",
}
OF_A_VERSION: Final = (Kind.DISABLE, Kind.ENABLE, Kind.DESTROY)


@contextmanager
def quick_machine(template: Path, tiny: KdfParameters) -> Iterator[Machine]:
    """A machine whose keystore opens in no time, so that a restart costs little more than Python's own start."""
    machine = Machine(template)
    try:
        machine.keystore.unlink()
        with KeystoreLock(machine.keystore) as lock, Secret(bytearray(PASSPHRASE.encode())) as passphrase:
            initialise(lock, passphrase, now=0, parameters=tiny)
        yield machine
    finally:
        machine.dispose()


class Histories:
    """What the clients saw, by group. Each time is of this process's monotonic clock, in nanoseconds."""

    def __init__(self) -> None:
        self.answered = 0
        self.cut_off = 0
        self._operations: dict[str, list[Operation]] = {group: [] for group in GROUPS}
        self._open: list[tuple[str, int, Call]] = []
        self._counting = Lock()

    def record(self, group: str, invoked: int, call: Call, reply: dict[str, Any]) -> None:
        ended = time.monotonic_ns()
        if call.kind is Kind.LIST:
            views = {view["keyId"]: _group_in(view) for view in reply["keyGroups"]}
            for each, operations in self._operations.items():
                operations.append(Operation(invoked, ended, call, Saw(views.get(each, ()))))
        else:
            self._operations[group].append(Operation(invoked, ended, call, _reply_in(reply)))
        with self._counting:
            self.answered += 1

    def record_cut_off(self, group: str, invoked: int, call: Call) -> None:
        self._open.append((group, invoked, call))

    def server_is_dead(self) -> None:
        """From now on nothing that was cut off can happen any more."""
        ended = time.monotonic_ns()
        for group, invoked, call in self._open:
            self._operations[group].append(Operation(invoked, ended, call, None))
        self.cut_off += len(self._open)
        self._open.clear()

    def objections(self) -> list[str]:
        found = {group: objection(operations) for group, operations in self._operations.items()}
        return [f"group {group}: {said}" for group, said in found.items() if said is not None]


def _group_in(view: dict[str, Any]) -> Group:
    numbers = [version["version"] for version in view["versions"]]
    if numbers == list(range(1, len(numbers) + 1)) and view["activeVersion"] == len(numbers):
        return tuple(version["status"] for version in view["versions"])
    # No state that a group can be in, so the checker objects to it, and shows it.
    return (f"active {view['activeVersion']}", *(f"v{v['version']} {v['status']}" for v in view["versions"]))


def _reply_in(reply: dict[str, Any]) -> Reply:
    if reply["status"] == "error":
        assert reply["errorCode"] == "InvalidRequest", reply
        return Refused()
    if "keyGroup" in reply:
        return Saw(_group_in(reply["keyGroup"]))
    if "ciphertext" in reply:
        return Sealed(ciphertext.parse(base64.b64decode(reply["ciphertext"])).version)
    return Done()


class Client:
    """Asks for random operations, up to three at once, until its connection ends."""

    def __init__(self, server: Server, histories: Histories, chance: Random) -> None:
        self._server = server
        self._histories = histories
        self._chance = chance
        self._tokens = dict.fromkeys(Kind, server.machine.admin_token) | {Kind.ENCRYPT: server.machine.api_token}

    def run(self) -> None:
        # It looks first: what was answered before the last restart has to be there.
        calls = [("", Call(Kind.LIST))]
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as replies:
            sock.settimeout(DEADLINE)
            try:
                sock.connect(str(self._server.socket))
            except OSError:
                return
            while self._ask(sock, replies, calls):
                calls = [(self._chance.choice(GROUPS), self._call()) for _ in range(self._chance.choice((1, 1, 2, 3)))]

    def _call(self) -> Call:
        kind = self._chance.choices(list(Kind), (2, 5, 2, 2, 2, 2, 2))[0]
        return Call(kind, self._chance.randint(1, 12) if kind in OF_A_VERSION else 0)

    def _ask(self, sock: socket.socket, replies: Any, calls: list[tuple[str, Call]]) -> bool:
        """Send `calls` and record what comes back; False when the connection has ended."""
        waiting = list(calls)
        invoked = time.monotonic_ns()
        try:
            sock.sendall(b"".join(json.dumps(self._request(*call)).encode() + b"\n" for call in calls))
            while waiting and (line := replies.readline()).endswith(b"\n"):
                group, call = waiting.pop(0)
                self._histories.record(group, invoked, call, json.loads(line))
        except ConnectionError:
            pass
        for group, call in waiting:
            if call.kind is not Kind.LIST:
                self._histories.record_cut_off(group, invoked, call)
        return not waiting

    def _request(self, group: str, call: Call) -> dict[str, Any]:
        request: dict[str, Any] = {"type": TYPES[call.kind], "token": self._tokens[call.kind], "keyId": group}
        if call.kind in OF_A_VERSION:
            request["version"] = call.version
        if call.kind is Kind.ENCRYPT:
            request["plaintext"] = "eA=="
        return request


def one_life(machine: Machine, histories: Histories, chance: Random, change: str = "") -> None:
    """Start a server, let the clients at it, and end it amid their requests; three times in four by SIGKILL."""
    server = machine.start(change=change)
    enough = histories.answered + chance.randint(50, 400)
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(Client(server, histories, Random(chance.random())).run) for _ in range(CLIENTS)]
        try:
            eventually("the clients were served", lambda: histories.answered >= enough or any(c.done() for c in clients))
        finally:
            if chance.randrange(4):
                server.kill()
            else:
                server.stop()
    histories.server_is_dead()
    for client in clients:
        client.result()


def one_history(machine: Machine, seed: int, change: str = "") -> Histories:
    chance, histories = Random(seed), Histories()
    for _ in range(ROUNDS):
        one_life(machine, histories, chance, change)
        if change and histories.objections():
            break
    return histories


def test_what_clients_see_across_kills_and_restarts_is_linearizable(
    template: Path, tiny: KdfParameters, long: bool
) -> None:
    end = time.monotonic() + (LONG_SECONDS if long else 0)
    seed = time.time_ns()
    while True:
        with quick_machine(template, tiny) as machine:
            histories = one_history(machine, seed)
        assert not histories.objections(), f"seed {seed}: " + "\n".join(histories.objections())
        # Otherwise it was a history that says little.
        assert histories.answered > ROUNDS * 50
        assert histories.cut_off > ROUNDS
        print(f"{histories.answered} operations answered, {histories.cut_off} cut off")
        if time.monotonic() > end:
            return
        seed += 1


@pytest.mark.parametrize("bug", ["reply_before_save", "lose_updates", "reuse_numbers"])
def test_a_server_with_a_bug_is_found_out(template: Path, tiny: KdfParameters, bug: str) -> None:
    with quick_machine(template, tiny) as machine:
        histories = one_history(machine, 1, f"from kms_tests.faults import mutants; mutants.{bug}()")
    assert histories.objections()
    print("\n".join(histories.objections()))
