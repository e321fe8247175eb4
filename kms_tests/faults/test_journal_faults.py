"""Every fault at every step of a commit to a journal, and of a migration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kms.core.derive import KdfParameters
from kms_tests.faults import keystores, program, strace
from kms_tests.faults.keystores import BEFORE, Table
from kms_tests.faults.program import CHEAP, JOURNALED
from kms_tests.faults.strace import Fault
from kms_tests.faults.test_linearizability import one_history, quick_machine
from kms_tests.integration.processes import DEADLINE, Machine, Server, Wire

ACTIONS = ("signal=KILL", "error=EIO", "error=ENOSPC")
CREATED: Table = {**BEFORE, "warm": {1: "ACTIVE"}}
AFTER: Table = {**CREATED, "billing": {1: "ACTIVE"}}


def _create(machine: Machine, wire: Wire, name: str) -> dict[str, Any] | None:
    wire.send({"type": "CreateKeyGroup", "keyId": name, "token": machine.admin_token})
    try:
        return wire.reply()
    except (AssertionError, OSError, json.JSONDecodeError):
        return None


def _started(machine: Machine) -> Server:
    """A server on the groups `CREATED`, whose journal is open."""
    keystores.make(machine.keystore)
    server = machine.start(change=JOURNALED + CHEAP)
    # The first begins a journal; and so that it is open, there is one more.
    with server.unix() as wire:
        for kind, version in (("EnableVersion", 2), ("DisableVersion", 2)):
            request = {"type": kind, "keyId": "default", "version": version, "token": machine.admin_token}
            assert wire.ask(**request)["status"] == "ok"
        reply = _create(machine, wire, "warm")
        assert reply is not None
        assert reply["status"] == "ok"
    assert machine.keystore.with_name("keystore.json.journal").exists()
    return server


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("call", ["pwrite64", "fsync"])
def test_a_server_survives_every_fault_at_every_step_of_a_commit_to_its_journal(
    machine: Machine, call: str, action: str
) -> None:
    server = _started(machine)
    fault = Fault(call, 1, action)
    log = machine.root / "calls"
    with server.unix() as wire:
        with strace.attached(server.pid, log, fault):
            reply = _create(machine, wire, "billing")
        struck = log.read_text(encoding="ascii")
        assert "(INJECTED)" in struck or "killed by SIGKILL" in struck, "the fault did not happen"
        if not fault.kills and call != "fsync":
            assert reply is not None
            assert reply["message"] == "the keystore could not be saved; nothing was changed"
            assert server.groups() == CREATED
            reply = _create(machine, wire, "billing")
            assert reply is not None
            assert reply["status"] == "ok"
            assert server.groups() == AFTER
            return
    assert reply is None or reply["status"] == "error"
    assert server.process.wait(DEADLINE) == (-9 if fault.kills else 70)
    again = machine.start(change=JOURNALED + CHEAP)
    found = again.groups()
    assert found in (CREATED, AFTER)
    assert found == CREATED or call == "fsync"
    assert not machine.temp_files()


@pytest.mark.parametrize("version", [2, 3])
def test_a_migration_survives_every_fault_at_every_step(machine: Machine, version: int) -> None:
    log = machine.root / "calls"

    def migrate(fault: Fault | None) -> int:
        for path in machine.data.glob("keystore.json*"):
            path.unlink()
        keystores.make_earlier(machine.keystore, version)
        environment = {**machine.environment, "PYTHONDONTWRITEBYTECODE": "1"}
        return strace.run(program.command("migrate", str(machine.keystore)), environment, log, fault).returncode

    assert migrate(None) == 0
    calls = strace.read(log)
    made = [n for n, call in enumerate(calls) if call.name == "openat" and "O_EXCL" in call.arguments[2]]
    counts: dict[str, int] = {}
    faults = []
    for number, call in enumerate(calls):
        counts[call.name] = counts.get(call.name, 0) + 1
        if number >= made[0] and call.name in ("openat", "write", "fsync", "rename"):
            faults.append((call.name, counts[call.name]))
    assert len(faults) >= 12
    for name, when in faults:
        for action in ACTIONS:
            status = migrate(Fault(name, when, action))
            keyring = keystores.load(machine.keystore)
            assert keystores.table(keyring) == BEFORE
            is_new = b'"formatVersion":4' in machine.keystore.read_bytes()
            assert is_new or status != 0
            if is_new:
                kept = machine.keystore.with_name(f"keystore.json.v{version}").read_bytes()
                assert f'"formatVersion":{version}'.encode() in kept
            assert not machine.temp_files()
    print(f"migration of format {version}: {len(faults)} calls, {len(faults) * len(ACTIONS)} faults")


def test_a_server_does_not_start_on_an_earlier_keystore_that_it_cannot_migrate(machine: Machine) -> None:
    keystores.make_earlier(machine.keystore, 3)
    old = machine.keystore.read_bytes()
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (90, 90))"
    refused = machine.refused_start("--no-tcp", prologue=small)
    assert refused.status == 74
    assert "File too large; no" in refused.stderr
    assert machine.keystore.read_bytes() == old


def test_what_clients_see_of_a_server_with_a_journal_across_kills_is_linearizable(
    template: Path, tiny: KdfParameters
) -> None:
    fold_often = "kms.limits.MIN_FOLD_BYTES = 8_000; "
    with quick_machine(template, tiny) as machine:
        histories = one_history(machine, 7, JOURNALED + fold_often)
        folded = machine.keystore.read_bytes()
    assert not histories.objections(), "\n".join(histories.objections())
    assert histories.answered > 1000
    assert b'"journal":"' in folded or b'"formerJournal":"' in folded
