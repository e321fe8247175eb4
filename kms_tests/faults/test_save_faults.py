"""Every fault at every step of a save.

Which system calls a save makes is not written here: they are recorded, and every one of them is made to fail, so that a
new one is covered by itself. Before each the process is killed; from each comes EIO, then ENOSPC; and the disk is full
after each length of what is written.

What must hold after every fault: the keystore loads as exactly the old one or the new one; what was answered `ok` is
there; no temp file survives a restart; and a server that lived answers data requests and can save again. A fault before
the rename to the keystore's name leaves the old one and a living server; so does a rename that the system refuses. From
the rename on the outcome is unknown, and the server stops with status 70. Only that closing a directory failed does not
matter.
"""

from __future__ import annotations

import contextlib
import json
import resource
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from kms.host.durable import TEMP_MARK
from kms_tests.faults import keystores, program, strace
from kms_tests.faults.keystores import BEFORE, MUTATIONS, NEW_PASSPHRASE, Mutation, Table
from kms_tests.faults.program import CHEAP
from kms_tests.faults.strace import Call, Fault
from kms_tests.integration.processes import DEADLINE, PASSPHRASE, Machine, Server, Wire

ACTIONS: Final = ("signal=KILL", "error=EIO", "error=ENOSPC")
SMALL_DISK: Final = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""


@dataclass(frozen=True)
class Step:
    """One system call of a save: the `when`-th of its name in its thread, and where it stands to the last rename."""

    name: str
    when: int
    is_before_the_rename: bool
    is_harmless: bool
    """It closes a descriptor that nothing was written through: a directory's, or the lock's."""

    def leaves_the_old(self, action: str) -> bool:
        """Whether it is known after `action` that nothing was changed. A rename says so by itself, but for an EIO."""
        return self.is_before_the_rename or (self.name.startswith("rename") and action == "error=ENOSPC")


def steps(calls: list[Call], keystore: Path) -> list[Step]:
    """The system calls, of those that were recorded, that take a file, from the save's first to its last."""
    renames = [call for call in calls if call.name.startswith("rename") and call.path(len(call.arguments) - 1) == keystore]
    assert len(renames) == 1, "the recorded program did not save once"
    counts: Counter[str] = Counter()
    found: list[Step] = []
    is_before, is_synced, saves = True, False, False
    for call in calls:
        if call.thread != renames[0].thread or not call.takes_a_file:
            continue
        counts[call.name] += 1
        is_before = is_before and call is not renames[0]
        saves = saves or _makes_a_file(call, keystore.parent)
        if saves and not (is_synced and call.name != "close") and not _closes_the_output(call):
            is_harmless = call.name == "close" and TEMP_MARK not in call.descriptor()[1].name
            found.append(Step(call.name, counts[call.name], is_before, is_harmless))
        is_synced = is_synced or (not is_before and call.name == "fsync")
    return found


def _closes_the_output(call: Call) -> bool:
    """What is printed has tests of its own."""
    return call.name == "close" and not call.descriptor()[1].is_absolute()


def _makes_a_file(call: Call, directory: Path) -> bool:
    return call.name == "openat" and "O_EXCL" in call.arguments[2] and directory in call.path(1).parents


class Subject:
    """A machine whose server is to be disturbed while it saves, again and again from the same keystore."""

    def __init__(self, machine: Machine, mutation: Mutation) -> None:
        self.machine = machine
        self.mutation = mutation
        keystores.make(machine.keystore)
        self.old = machine.keystore.read_bytes()
        self.server: Server | None = None
        self._wire: Wire | None = None
        self._blob = ""

    def fresh(self) -> Server:
        """A server on the old keystore with a connection; the one that is there if it has that."""
        is_old = self.machine.keystore.read_bytes() == self.old
        if is_old and self.server is not None and self.server.process.poll() is None:
            return self.server
        self.stop()
        self.machine.keystore.write_bytes(self.old)
        return self._start()

    def _start(self) -> Server:
        self.disconnect()
        self.server = self.machine.start(change=CHEAP)
        self._wire = self.server.unix()
        self._blob = self._blob or self._data("Encrypt", plaintext="c2VjcmV0")["ciphertext"]
        assert self._data("Decrypt", ciphertext=self._blob)["plaintext"] == "c2VjcmV0"
        return self.server

    def disconnect(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def stop(self) -> None:
        self.disconnect()
        if self.server is not None and self.server.process.poll() is None:
            assert self.server.stop() == 0, self.server.stderr

    def _data(self, kind: str, **more: str) -> dict[str, Any]:
        assert self._wire is not None
        return self._wire.ask(type=kind, token=self.machine.api_token, **more)

    def mutate(self) -> dict[str, Any] | None:
        """The reply to the mutation; None when the connection ended without one."""
        assert self._wire is not None
        self._wire.send({**self.mutation.request, "token": self.machine.admin_token})
        try:
            return self._wire.reply()
        except (AssertionError, OSError, json.JSONDecodeError):
            return None

    def lives_with(self, expected: Table) -> None:
        """The server serves this, in memory and on the disk, and no temp file is about."""
        assert self.server is not None
        assert self.server.groups() == expected
        assert self._data("Decrypt", ciphertext=self._blob)["plaintext"] == "c2VjcmV0"
        fresh = self._data("GenerateDataKey")
        opened = self._data("Decrypt", ciphertext=fresh["wrappedDataKey"])
        assert opened["plaintext"] == fresh["plaintextDataKey"]
        assert not self.machine.temp_files()

    def restarted(self) -> Table:
        """What a new server finds; it must have what is exactly the old or the new keystore."""
        content = self.machine.keystore.read_bytes()
        server = self._start()
        found = server.groups()
        assert found in (BEFORE, self.mutation.after)
        assert (content == self.old) == (found == BEFORE)
        self.lives_with(found)
        return found

    def saves_again(self) -> None:
        reply = self.mutate()
        assert reply is not None
        assert reply["status"] == "ok", reply
        self.lives_with(self.mutation.after)


@contextlib.contextmanager
def _subject(machine: Machine, mutation: Mutation) -> Iterator[Subject]:
    subject = Subject(machine, mutation)
    try:
        yield subject
    finally:
        subject.disconnect()
        if subject.server is not None and subject.server.process.poll() is None:
            subject.server.kill()


def _record(subject: Subject) -> list[Step]:
    log = subject.machine.root / "calls"
    server = subject.fresh()
    with strace.attached(server.pid, log):
        subject.saves_again()
    return steps(strace.read(log), subject.machine.keystore)


def _disturb(subject: Subject, step: Step, action: str) -> None:
    """One fault, and all that must hold after it."""
    fault = Fault(step.name, step.when, action)
    log = subject.machine.root / "calls"
    server = subject.fresh()
    with strace.attached(server.pid, log, fault):
        reply = subject.mutate()
    struck = log.read_text(encoding="ascii")
    assert "(INJECTED)" in struck or "killed by SIGKILL" in struck, f"the fault did not happen: {fault}"
    if fault.kills:
        assert reply is None
        assert server.process.wait(DEADLINE) == -9
        found = subject.restarted()
        assert found == BEFORE or not step.is_before_the_rename
    elif step.is_harmless:
        assert reply is not None
        assert reply["status"] == "ok"
        subject.lives_with(subject.mutation.after)
    elif step.leaves_the_old(action):
        assert reply is not None
        assert reply == {
            "status": "error",
            "errorCode": "InternalError",
            "message": "the keystore could not be saved; nothing was changed",
        }
        assert subject.machine.keystore.read_bytes() == subject.old
        subject.lives_with(BEFORE)
        subject.saves_again()
    else:
        assert reply is None or reply["status"] == "error"
        assert server.process.wait(DEADLINE) == 70, server.stderr
        subject.restarted()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_server_survives_every_fault_at_every_step_of_a_save(machine: Machine, name: str, long: bool) -> None:
    with _subject(machine, MUTATIONS[name]) as subject:
        recorded = _record(subject)
        assert {step.name for step in recorded} >= {"openat", "write", "fsync", "close", "rename"}
        for number, step in enumerate(recorded):
            # The others make the calls of a rotation: in the short form each of their steps gets one of the faults.
            is_whole = long or name == "rotate"
            for action in ACTIONS if is_whole else ACTIONS[number % 3 :][:1]:
                print(f"{name}: {action} at {step.name} #{step.when}")
                _disturb(subject, step, action)


def _lengths(size: int, *, long: bool) -> list[int]:
    """Lengths short of `size`: every one of them, or the ends and a sample."""
    return list(range(size)) if long else sorted({0, 1, *range(2, size, 61), size - 2, size - 1})


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_server_survives_a_disk_that_is_full_after_any_length(machine: Machine, name: str, long: bool) -> None:
    with _subject(machine, MUTATIONS[name]) as subject:
        subject.fresh()
        subject.saves_again()
        size = machine.keystore.stat().st_size
        server = subject.fresh()
        hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)[1]
        lengths = _lengths(size, long=long)
        for length in lengths:
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (length, hard))
            reply = subject.mutate()
            assert reply is not None
            assert reply["status"] == "error", f"a keystore was saved in {length} bytes"
            assert machine.keystore.read_bytes() == subject.old
            assert not machine.temp_files()
        subject.lives_with(BEFORE)
        # The log has grown past the keystore's size, but it is no part of the save.
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, hard))
        subject.saves_again()
        print(f"{name}: {len(lengths)} lengths")


def _change_passphrase(machine: Machine, fault: Fault | None) -> tuple[int, list[Call]]:
    environment = {**machine.environment, "MINIKMS_NEW_PASSPHRASE": NEW_PASSPHRASE, "PYTHONDONTWRITEBYTECODE": "1"}
    log = machine.root / "calls"
    done = strace.run(program.command("admin", "change-passphrase"), environment, log, fault)
    assert "Traceback" not in done.stderr
    return done.returncode, strace.read(log)


def _assert_old_or_new(machine: Machine, old: bytes, *, must_be_old: bool, must_be_new: bool) -> None:
    is_old = machine.keystore.read_bytes() == old
    assert not (must_be_old and not is_old)
    assert not (must_be_new and is_old)
    keyring = keystores.load(machine.keystore, PASSPHRASE if is_old else NEW_PASSPHRASE)
    assert keystores.table(keyring) == BEFORE
    assert not machine.temp_files()


def test_a_change_of_passphrase_survives_every_fault_at_every_step(machine: Machine) -> None:
    keystores.make(machine.keystore)
    old = machine.keystore.read_bytes()
    status, calls = _change_passphrase(machine, None)
    assert status == 0
    recorded = steps(calls, machine.keystore)
    for step in recorded:
        for action in ACTIONS:
            fault = Fault(step.name, step.when, action)
            print(fault)
            machine.keystore.write_bytes(old)
            status, calls = _change_passphrase(machine, fault)
            if fault.kills:
                assert status == -9
            else:
                assert any(call.injected for call in calls), "the fault did not happen"
                assert status == (0 if step.is_harmless else 74 if step.leaves_the_old(action) else 70)
            _assert_old_or_new(machine, old, must_be_old=step.is_before_the_rename, must_be_new=status == 0)
    print(f"change-passphrase: {len(recorded)} calls, {len(recorded) * len(ACTIONS)} faults")


def test_a_change_of_passphrase_survives_a_disk_that_is_full_after_any_length(machine: Machine, long: bool) -> None:
    keystores.make(machine.keystore)
    old = machine.keystore.read_bytes()
    environment = {"MINIKMS_NEW_PASSPHRASE": NEW_PASSPHRASE}
    # The lock file has the pid and a line end, and is written first.
    lengths = [length for length in _lengths(len(old), long=long) if length > 8]
    for length in lengths if long else lengths[::3]:
        done = machine.admin("change-passphrase", environment=environment, prologue=SMALL_DISK.format(length))
        assert done.status == 74, done.stderr
        assert "nothing was changed" in done.said_one_line("kms-admin")
        _assert_old_or_new(machine, old, must_be_old=True, must_be_new=False)
